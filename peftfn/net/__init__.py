"""Running a model with an adapter as an argument."""
