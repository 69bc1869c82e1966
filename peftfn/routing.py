"""Routing: gates that are functions, for `net.gated`."""

from peftfn.many.routing import arrow, phatgoose, sigmoid_gate, top_k, without_general, xlora

__all__ = ["arrow", "phatgoose", "sigmoid_gate", "top_k", "without_general", "xlora"]
