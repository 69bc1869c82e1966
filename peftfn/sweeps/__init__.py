"""Many configurations through a few slots of one stack."""
