"""The ragged softmax of L3: its specification, faster ways that equal it, and the tables they read."""

from l3paper.lookup.operators import REFERENCES
from l3paper.lookup.operators import grouped as _grouped
from l3paper.lookup.reference import Lookup, Plan, blocked, loop, padded

LOOKUPS: dict[str, Lookup] = {**REFERENCES, "grouped": _grouped}
"""The lookups by name. `loop` is the specification, `grouped` the fastest and the default."""

__all__ = ["LOOKUPS", "Lookup", "Plan", "blocked", "loop", "padded"]
