"""Routing: gates that are functions, for `net.gated`."""

from peftfn.many.arrow import arrow, without_general
from peftfn.many.routing import phatgoose, sigmoid_gate, top_k, xlora

__all__ = ["arrow", "phatgoose", "sigmoid_gate", "top_k", "without_general", "xlora"]
