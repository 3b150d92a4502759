"""Reading a checkpoint's files, which a stranger may have written.

They are JSON and safetensors, so no code of theirs runs. Only regular files are read, JSON only up to a
bounded size, and what they say is checked before it is used. `sums.json` holds the SHA-256 of every
other file: it shows damage and does not authenticate, since whoever changes a file can compute its sum
again.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from l3paper.files import sha256

MOST_BYTES = {
    "sums.json": 2**16,
    "config.json": 2**16,
    "tokenizer.json": 2**25,
    "progress.json": 2**30,
}
"""For every JSON file of a checkpoint: enough for half a million tokens, and for ten million steps."""

MOST_HEADER = 2**24
"""For the bytes of a safetensors file's header: enough for 100,000 tensors."""

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
    """A tensor in a file."""

    shape: torch.Size
    dtype: torch.dtype
    offset: int
    """The place of its first byte in the file."""


def file_size(path: Path) -> int:
    """The bytes of a regular file. Raises ValueError if it is missing, empty, or of another kind.

    The file is not opened: opening a FIFO can block, and a device may never end.
    """
    if not path.exists():
        raise ValueError(f"the folder is incomplete: there is no {path.name}")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path.name} is empty, or not a regular file")
    return path.stat().st_size


def read_small(path: Path) -> bytes:
    """The content of a JSON file. Raises ValueError if it has more than MOST_BYTES."""
    size, most = file_size(path), MOST_BYTES[path.name]
    if size > most:
        raise ValueError(f"{path.name} has {size:,} bytes; it must have at most {most:,}")
    with open(path, "rb") as file:
        return file.read(size)


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError for anything else, and for more than MOST_BYTES."""
    return parse_object(read_small(path), path.name)


def parse_object(text: bytes, name: str) -> dict:
    """Parse a JSON object. Raises ValueError, mentioning `name`, for anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} is not a JSON object")
    return parsed


def require_intact(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a file that is missing or unlike its SHA-256."""
    sums = read_json(folder / "sums.json")
    for name in names:
        if file_size(folder / name) and sha256(folder / name) != sums.get(name):
            raise ValueError(f"{name} is damaged")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, without their numbers: only the header is read.

    The format: the length of a JSON header in 8 bytes, little-endian, the header, then the numbers.
    (https://huggingface.co/docs/safetensors) Raises ValueError if the header is not valid, if the file
    has another size than it says, and for empty tensors and types that are not in DTYPES.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MOST_HEADER):
            raise ValueError(f"{path.name} is damaged: its header says that it has {length:,} bytes")
        header = parse_object(file.read(length), f"{path.name} is damaged: its header")
    header.pop("__metadata__", None)
    tensors, start = {}, 8 + length
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str(dtype),
                "shape": [] | [_] | [_, _] as shape,
                "data_offsets": [int(first), int(last)],
            } if (
                dtype in DTYPES
                and first >= 0
                and all(type(side) is int and side > 0 for side in shape)
                and last - first == math.prod(shape) * DTYPES[dtype].itemsize
            ):
                tensors[name] = StoredTensor(torch.Size(shape), DTYPES[dtype], start + first)
            case _:
                raise ValueError(f"{path.name} describes {name!r:.80} as {entry!r:.80}")
    end = start + sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
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


def require_like(name: str, tensor: Tensor | StoredTensor | None, like: Tensor) -> None:
    """Raise ValueError, mentioning `name`, unless the tensor is there and has the shape and type."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{name} is of type {tensor.dtype} {list(tensor.shape)}; "
            f"it must be of type {like.dtype} {list(like.shape)}"
        )


def require_state(tensors: Mapping[str, Tensor | StoredTensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless these are those of a state dict: no more, no fewer."""
    for name, like in state.items():
        require_like(name, tensors.get(name), like)
    if surplus := tensors.keys() - state.keys():
        raise ValueError(f"the model has no tensor {min(surplus)!r:.80}")
