"""Functions around an adapter."""
