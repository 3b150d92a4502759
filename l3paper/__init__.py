"""L3: Large Lookup Layers (arXiv:2601.21461), from equation to running code.

The paper is in `allocation` (Algorithm 1), `layer` (the equation; its lookup and table are in `lookup`)
and `gpt` (the model); `train` trains it. Everything else stands around these.
"""

from l3paper.allocation import allocation_to_bounds, compute_lzw_allocation
from l3paper.gpt import GPT, GPTConfig
from l3paper.layer import L3Layer
from l3paper.parts.optimizer import l3_param_groups

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "L3Layer",
    "allocation_to_bounds",
    "compute_lzw_allocation",
    "l3_param_groups",
]
