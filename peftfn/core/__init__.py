"""A method, a plan, an adapter, and the pure functions of the three."""
