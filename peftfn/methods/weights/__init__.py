"""Methods that change a weight, one a file."""
