"""Records of `peftfn compare`."""
