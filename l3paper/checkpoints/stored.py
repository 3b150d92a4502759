"""Reading a checkpoint's files, which a stranger may have written.

They are JSON and safetensors, so no code of theirs runs. Only regular files are read, JSON only up to a
bounded size, and their content is checked before it is used. `sums.json` holds the SHA-256 of every
other file: it shows damage and does not authenticate, since whoever changes a file can compute its sum
again.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from l3paper.files import sha256
from l3paper.lookup.offload import FileTable

MOST_JSON = 2**25
"""Bytes that a JSON file may have: enough for the tokenizer of half a million tokens."""

MOST_PROGRESS = 2**30
"""Bytes that a run's measurements may have: enough for ten million steps."""

TABLE_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of a table's numbers by their safetensors names."""


@contextmanager
def readable(path: Path, most: float = float("inf")) -> Iterator[None]:
    """Let the block read a file: whatever it raises becomes a ValueError that names the file.

    Raises ValueError beforehand unless this is a regular file of 1 to `most` bytes. It is not opened
    for that: opening a FIFO can block, and a device may never end.
    """
    if not path.exists():
        raise ValueError(f"the folder is incomplete: there is no {path.name}")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path.name} is empty, or not a regular file")
    if path.stat().st_size > most:
        raise ValueError(
            f"{path.name} has {path.stat().st_size:,} bytes; it must have at most {most:,}"
        )
    try:
        yield
    except Exception as error:  # a damaged file can raise nearly anything
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{path.name} is damaged: {first_line:.200}") from error


def read_json(path: Path, most: int = MOST_JSON) -> dict:
    """Read a JSON object. Raises ValueError, naming the file, for anything else or more bytes."""
    with readable(path, most):
        parsed = json.loads(path.read_bytes())
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
        return parsed


def require_intact(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a file that is missing or unlike its SHA-256."""
    sums = read_json(folder / "sums.json")
    for name in names:
        with readable(folder / name):
            if sha256(folder / name) != sums.get(name):
                raise ValueError("it is unlike its SHA-256")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file into memory: only the numbers that are used are read.

    Raises ValueError, naming the file, if it is damaged.
    """
    with readable(path):
        return load_file(path)


def file_tables(path: Path) -> dict[str, FileTable]:
    """The matrices of a safetensors file, left where they are: only its header is read.

    The format: the length of a JSON header in 8 bytes, little-endian, the header, then the numbers
    (https://huggingface.co/docs/safetensors). Raises ValueError, naming the file, if the header is not
    valid or does not fit the size of the file.
    """
    with readable(path):
        with safe_open(path, "numpy"):  # checks the header and the size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: FileTable(
                path, 8 + length + entry["data_offsets"][0], entry["shape"], TABLE_TYPES[entry["dtype"]]
            )
            for name, entry in header.items()
        }


def require_like(name: str, tensor: Tensor | FileTable | None, like: Tensor) -> None:
    """Raise ValueError, mentioning `name`, unless the tensor is there and has the shape and type."""
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{name} is of type {tensor.dtype} {list(tensor.shape)}; "
            f"it must be of type {like.dtype} {list(like.shape)}"
        )


def require_state(tensors: Mapping[str, Tensor | FileTable], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless these are those of a state dict: no more, no fewer."""
    for name, like in state.items():
        require_like(name, tensors.get(name), like)
    if surplus := tensors.keys() - state.keys():
        raise ValueError(f"the model has no tensor {min(surplus)!r:.80}")
