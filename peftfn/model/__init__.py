"""What a model offers."""
