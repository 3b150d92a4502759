"""Reading a checkpoint's files, which a stranger may have written.

Only regular files of bounded size are read, and what they say is checked before it is used. No code of
theirs runs: they are JSON, and safetensors, in which the length of a JSON header (8 bytes,
little-endian) and the header come before the numbers (https://huggingface.co/docs/safetensors).

`sums.json` holds the SHA-256 of every other file. It shows damage and does not authenticate: whoever
changes a file can compute its sum again.
"""

import json
import math
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from l3paper.files import sha256

SMALL = 2**16
"""Bytes that sums.json and config.json may have."""

MOST_HEADER = 2**24
"""Bytes that the header of a safetensors file may have: enough for 100,000 tensors."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
"""Types of the numbers in a checkpoint, by their safetensors names."""


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, as the header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Of its first byte in the file."""


def file_size(path: Path) -> int:
    """The bytes of a regular file. Raises ValueError for an empty one, and for any other kind.

    The file is not opened: opening a FIFO can block, and a device may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if not status.st_size:
        raise ValueError(f"{path.name} is empty")
    return status.st_size


def read_text(path: Path, most: int) -> str:
    """A UTF-8 text. Raises ValueError for one of more than `most` bytes."""
    size = file_size(path)
    if size > most:
        raise ValueError(f"{path.name} has {size:,} bytes; it must have at most {most:,}")
    with open(path, "rb") as file:
        return file.read(size).decode()


def read_json(path: Path, most: int) -> dict:
    """A JSON object. Raises ValueError for anything else, and for more than `most` bytes."""
    return parse_object(read_text(path, most), path.name)


def parse_object(text: str | bytes, name: str) -> dict:
    """Parse a JSON object. Raises ValueError, mentioning `name`, if it is not one."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} is not a JSON object")
    return parsed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, without reading their numbers.

    Raises ValueError if the file's size differs from what its header says, or if a tensor has more than
    two dimensions, a type that is not in DTYPES, or another number of bytes than its shape needs.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MOST_HEADER):
            raise ValueError(f"{path.name} is damaged: its header says that it has {length:,} bytes")
        header = parse_object(file.read(length), f"{path.name} is damaged: its header")
    header.pop("__metadata__", None)
    tensors, end = {}, 8 + length
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str(dtype),
                "shape": [] | [_] | [_, _] as shape,
                "data_offsets": [first, last],
            } if (
                dtype in DTYPES
                and all(type(number) is int and number >= 0 for number in (*shape, first, last))
                and last - first == math.prod(shape) * DTYPES[dtype].itemsize
            ):
                tensors[name] = StoredTensor(tuple(shape), DTYPES[dtype], 8 + length + first)
                end = max(end, 8 + length + last)
            case _:
                raise ValueError(
                    f"{path.name} stores {name!r:.80} in a type or shape that is not valid"
                )
    if size != end:
        raise ValueError(f"{path.name} is damaged: it has {size:,} bytes; its header says {end:,}")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError as `read_header` does."""
    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def require_intact(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a file unlike its SHA-256, FileNotFoundError for one that is missing."""
    sums = read_json(folder / "sums.json", SMALL)
    for name in names:
        if file_size(folder / name) and sha256(folder / name) != sums.get(name):
            raise ValueError(f"{name} is damaged")


def require_like(
    name: str, tensor: Tensor | StoredTensor | None, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raise ValueError, mentioning `name`, unless the tensor is there and has this shape and type."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}; "
            f"it must have {tuple(shape)} and {dtype}"
        )


def require_state(tensors: Mapping[str, Tensor | StoredTensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless these are those of a state dict: no more, no fewer."""
    for name, like in state.items():
        require_like(name, tensors.get(name), like.shape, like.dtype)
    if surplus := tensors.keys() - state.keys():
        raise ValueError(f"the model has no tensor {min(surplus)!r:.80}")
