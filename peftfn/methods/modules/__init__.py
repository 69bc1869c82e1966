"""Methods around the forward of a module, one a file."""
