"""What may stand for a tensor, and what surrounds a call."""
