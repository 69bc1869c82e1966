"""Many adapters at once."""
