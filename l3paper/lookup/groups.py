"""The positions of a batch, grouped by token: what every fast lookup needs first.

Sorted by token, the positions of a batch fall into groups that share their rows, and a token's rows
are a contiguous slice of the table. The groups depend on the token ids and the bounds alone, not on
the hidden state, so all L3 layers of a model can share them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """N positions in G groups, one a distinct token. All tensors are long, on the ids' device."""

    order: Tensor  # (N,) sorts the positions by token
    inverse: Tensor  # (N,) puts them back
    start: Tensor  # (G,) a group's first place in the sorted order
    count: Tensor  # (G,) its positions
    first: Tensor  # (G,) its token's first row of the table
    length: Tensor  # (G,) its token's rows


def group_by_token(token_ids: Tensor, bounds: Tensor) -> Groups:
    """Group positions with these ids (N,); token t owns the rows bounds[t] : bounds[t + 1]."""
    order = token_ids.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    tokens, count = token_ids[order].unique_consecutive(return_counts=True)
    first = bounds[tokens]
    return Groups(order, inverse, count.cumsum(0) - count, count, first, bounds[tokens + 1] - first)
