"""The cache of attention's keys and values, for text that is generated one token after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a batch of sequences, for all blocks.

    `lengths` says how many tokens of each sequence are in it. A forward pass writes behind those, and
    `advance` then says how many of the new tokens count. The padding of a shorter prompt does not: it
    lies beyond its sequence's length, where nothing looks, until it is overwritten.
    """

    def __init__(
        self,
        blocks: int,
        batch_size: int,
        heads: int,
        sequence_len: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = blocks, batch_size, sequence_len, heads, head_dim
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def begin(self, time: int) -> "list[BlockCache]":
        """Room for `time` more tokens per sequence, one view per block.

        Raises ValueError if they do not fit.
        """
        sequence_len, device = self.keys.shape[2], self.keys.device
        end = max(self.lengths) + time
        if end > sequence_len:
            raise ValueError(
                f"{max(self.lengths)} tokens and {time} more exceed the cache's {sequence_len}"
            )
        starts = torch.tensor(self.lengths, device=device)[:, None]
        positions = starts + torch.arange(time, device=device)  # (B, time)
        mask = (torch.arange(end, device=device) <= positions[..., None])[:, None]  # (B, 1, time, end)
        tables = zip(self.keys, self.values, strict=True)
        return [BlockCache(keys, values, positions, mask) for keys, values in tables]

    def advance(self, counts: Sequence[int]) -> None:
        """Count that many of each sequence's new tokens as being in the cache."""
        self.lengths = [held + new for held, new in zip(self.lengths, counts, strict=True)]


@dataclass(frozen=True)
class BlockCache:
    """One block's view of the cache during one forward pass."""

    keys: Tensor  # (B, sequence_len, heads, head_dim)
    values: Tensor
    positions: Tensor  # (B, time) of the new tokens
    mask: Tensor  # (B, 1, time, end) True for what a new token may see

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new (B, heads, time, head_dim); return all so far (B, heads, end, head_dim)."""
        sequence = torch.arange(len(k), device=k.device)[:, None]
        end = self.mask.shape[-1]
        for held, new in ((self.keys, k), (self.values, v)):
            held[sequence, self.positions] = new.transpose(1, 2).to(held.dtype)
        return self.keys[:, :end].transpose(1, 2), self.values[:, :end].transpose(1, 2)
