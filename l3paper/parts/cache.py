"""What attention and Engram layers keep of earlier tokens while text is generated token by token."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a batch of sequences, for all blocks, and histories of Engram layers.

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
        histories: Iterable[str] = (),
        width: int = 0,
    ):
        """`histories` names the layers that keep one; their values are `width` wide."""
        shape = blocks, batch_size, sequence_len, heads, head_dim
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.held = {
            name: {
                "ids": torch.full((batch_size, sequence_len), -1, device=device),
                "values": torch.zeros(batch_size, sequence_len, width, device=device, dtype=dtype),
            }
            for name in histories
        }

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

    def histories(self, positions: Tensor) -> "dict[str, History]":
        """The histories by layer, for new tokens at these positions (B, time)."""
        return {name: History(held, positions) for name, held in self.held.items()}

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


@dataclass(frozen=True)
class History:
    """One Engram layer's view of earlier tokens during one forward pass."""

    held: dict[str, Tensor]  # "ids" (B, sequence_len) and "values" (B, sequence_len, C)
    positions: Tensor  # (B, time) of the new tokens

    def add(self, name: str, new: Tensor) -> Callable[[int], Tensor]:
        """Write `new` (B, time, ...); return a function from an offset to what stands that far before.

        Before the beginning stand the id -1, and values of 0.
        """
        held = self.held[name]
        sequence = torch.arange(len(new), device=new.device)[:, None]
        held[sequence, self.positions] = new.to(held.dtype)

        def before(offset: int) -> Tensor:
            place = self.positions - offset
            found = held[sequence, place.clamp(min=0)].to(new.dtype)  # (B, time, ...)
            exists = (place >= 0).view(*place.shape, *[1] * (new.ndim - 2))
            return found.where(exists, 0 if new.is_floating_point() else -1)

        return before
