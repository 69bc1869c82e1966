"""Methods on the inputs of a backbone, one a file: virtual tokens, and keys and values in front of a cache."""
