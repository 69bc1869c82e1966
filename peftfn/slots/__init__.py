"""What stands in a slot during a call."""
