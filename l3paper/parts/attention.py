"""Causal self-attention: rotary positions, normalised queries and keys, shared heads, and a cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.layer import rms_norm


class KVCache:
    """Attention's keys and values of a batch of sequences, for all blocks.

    `lengths` says how many tokens of each sequence are in. A forward pass appends behind those; its
    caller then adds to `lengths` how many of the new tokens count. What fills up a shorter prompt
    does not: it lies beyond its sequence's length, where nothing looks, until it is overwritten.
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

    def begin(self, time: int) -> Tensor:
        """Get ready for `time` more tokens a sequence; their positions (B, time).

        Raises ValueError where they do not fit.
        """
        sequence_len = self.keys.shape[2]
        if max(self.lengths) + time > sequence_len:
            raise ValueError(
                f"{max(self.lengths)} tokens and {time} more exceed the cache's {sequence_len}"
            )
        device = self.keys.device
        starts = torch.tensor(self.lengths, device=device)[:, None]
        self._positions = starts + torch.arange(time, device=device)  # (B, time)
        self._end = max(self.lengths) + time
        seen = torch.arange(self._end, device=device)
        self.mask = (seen <= self._positions[..., None])[:, None]  # (B, 1, time, end)
        return self._positions

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new (B, heads, time, head_dim); all so far come back, (B, heads, end, head_dim)."""
        sequence = torch.arange(len(k), device=k.device)[:, None]
        for held, new in ((self.keys[block], k), (self.values[block], v)):
            held[sequence, self._positions] = new.transpose(1, 2).to(held.dtype)
        return tuple(held[block, :, : self._end].transpose(1, 2) for held in (self.keys, self.values))


class Attention(nn.Module):
    """Causal self-attention; `n_kv_head` heads of keys and values serve `n_head` of queries."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        self.head_dim = n_embd // n_head
        self.c_q = nn.Linear(n_embd, n_embd, bias=False)
        self.c_k = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, block: int = 0
    ) -> Tensor:
        """x (B, T, C) to (B, T, C); the cache, where given, is that of this block and has begun."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for linear in (self.c_q, self.c_k, self.c_v)
        )
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.extend(block, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v.to(q.dtype),
            attn_mask=None if cache is None else cache.mask,
            is_causal=cache is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., T, head_dim); cos and sin (..., T, head_dim / 2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)
