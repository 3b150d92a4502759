"""The ragged softmax of L3: its specification, and the faster ways that equal it."""

from l3paper.lookup.reference import LOOKUPS, Lookup, blocked, loop, padded

__all__ = ["LOOKUPS", "Lookup", "blocked", "loop", "padded"]
