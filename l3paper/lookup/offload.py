"""L3 tables outside the accelerator: only the rows of a step's tokens are copied (paper, section 3).

The rows that a layer needs depend on the token ids alone, so their copy starts before the first block,
and the layer waits for it. On CUDA the rows are gathered on the CPU, and transferred while the blocks
compute. Files are read, not memory-mapped, so that a process holds only the rows that it reads.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l3paper.lookup.reference import Plan


class MemoryTable:
    """A tensor (v, width) in CPU memory."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def read(self, ranges: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Write the rows first : last of every range into `out`, one range after the other."""
        torch.cat([self.tensor[first:last] for first, last in ranges], out=out)


class FileTable:
    """A matrix (v, width) that begins at byte `offset` of a file, row after row."""

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype):
        self.file = open(Path(path).absolute(), "rb", buffering=0)  # noqa: SIM115, open as long as the table
        self.offset, self.shape, self.dtype = offset, torch.Size(shape), dtype
        self._lock = threading.Lock()

    def __reduce__(self):
        """A copy, or what is unpickled, opens the file again by its path."""
        return FileTable, (self.file.name, self.offset, self.shape, self.dtype)

    def read(self, ranges: Sequence[tuple[int, int]], out: Tensor) -> None:
        """As `MemoryTable.read`. Raises ValueError for a file that ends too early."""
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")
        row_bytes, done = self.shape[1] * self.dtype.itemsize, 0
        for first, last in ranges:
            place, end = self.offset + first * row_bytes, done + (last - first) * row_bytes
            while done < end:
                count = self._read_at(place, view[done:end])
                if not count:
                    raise ValueError(f"{self.file.name!r} ends before row {last}: it was cut short")
                place, done = place + count, done + count

    def _read_at(self, place: int, out: memoryview) -> int:
        """Read bytes from this place on, wherever other threads and processes read the same file."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [out], place)
        with self._lock:  # on Windows
            self.file.seek(place)
            return self.file.readinto(out)


Table = MemoryTable | FileTable


class Rows(NamedTuple):
    """The table rows of some token ids, as a small table of their own, on the model's device."""

    token_ids: Tensor
    """The ids, of their own shape, renumbered from 0."""
    bounds: Tensor
    """Renumbered id t owns rows bounds[t] : bounds[t + 1]."""
    keys: Tensor
    values: Tensor
    ready: torch.cuda.Event | None
    """What to wait for before the tensors are used; None if they are there already."""


@dataclass(eq=False)
class StoredPlan(Plan):
    """A plan that brings the rows along; their copy has started."""

    rows: Rows

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The keys and values, for which the current stream waits."""
        if self.rows.ready is not None:
            here = torch.cuda.current_stream(self.rows.keys.device)
            here.wait_event(self.rows.ready)
            for tensor in self.rows[:4]:
                tensor.record_stream(here)
        return self.rows.keys, self.rows.values


class RowStore:
    """Tables that stay where they are; copies of single rows leave them.

    `keys` (v, d_in) and `values` (v, d_emb) are the same object if they are tied; bounds (V + 1,).
    `rows_read` counts the rows that were copied; the key and the value of a row count once.
    """

    def __init__(self, keys: Table, values: Table, bounds: Tensor, device: torch.device):
        self.keys, self.values, self.bounds = keys, values, bounds.cpu()
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rows_read = 0

    def __reduce__(self):
        """A copy, or what is unpickled, has a stream of its own, and counts its reads from 0."""
        return RowStore, (self.keys, self.values, self.bounds, self.device)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's key and value."""
        tables = {id(table): table for table in (self.keys, self.values)}
        return sum(table.shape[1] * table.dtype.itemsize for table in tables.values())

    def fetch(self, token_ids: Tensor) -> Rows:
        """Start to copy the rows of these ids (...) to the device; those of an id travel once."""
        ids, renumbered = token_ids.cpu().unique(return_inverse=True)
        first, last = self.bounds[ids], self.bounds[ids + 1]
        bounds = torch.cat([first.new_zeros(1), (last - first).cumsum(0)])
        ranges = list(zip(first.tolist(), last.tolist(), strict=True))
        keys = self._read(self.keys, ranges, int(bounds[-1]))
        tied = self.values is self.keys
        values = keys if tied else self._read(self.values, ranges, int(bounds[-1]))
        self.rows_read += len(keys)
        if self.stream is None:
            return Rows(renumbered, bounds, keys, values, None)
        with torch.cuda.stream(self.stream):
            small = (t.pin_memory().to(self.device, non_blocking=True) for t in (renumbered, bounds))
            keys = keys.to(self.device, non_blocking=True)
            values = keys if tied else values.to(self.device, non_blocking=True)
            return Rows(*small, keys, values, self.stream.record_event())

    def _read(self, table: Table, ranges: Sequence[tuple[int, int]], rows: int) -> Tensor:
        pinned = self.stream is not None  # or the copy would not run beside the computation
        out = torch.empty(rows, table.shape[1], dtype=table.dtype, pin_memory=pinned)
        if rows:
            table.read(ranges, out)
        return out


def offload_tables(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model to `device` for inference, the tables of its L3 layers to CPU memory; return it.

    The tables are not parameters any more: neither an optimizer nor a state dict sees them.
    """
    device = torch.device(device)
    # By what it can do, since the module of RowTable imports this one.
    for layer in [module for module in model.modules() if hasattr(module, "serve_from")]:
        keys, values = (t.detach().cpu() for t in layer.tables())
        first = MemoryTable(keys)
        second = first if layer.tie_kv else MemoryTable(values)
        layer.serve_from(RowStore(first, second, layer.bounds, device))
    return model.to(device)
