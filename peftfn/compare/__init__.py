"""Methods compared on real data, each at its own best learning rate: `peftfn compare`."""
