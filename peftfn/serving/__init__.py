"""Serving: requests of many adapters, answered in one running batch."""
