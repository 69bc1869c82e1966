"""What the commands of `peftfn` do, one module each; `peftfn/__main__.py` has their options."""
