"""A trained model as a folder: configuration, tokenizer, weights, and the L3 tables by themselves.

Weights are safetensors, the rest JSON: loading runs no code of the file's. The tables have a file of
their own, which can stay where it is while the model runs.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from l3paper.data.tokenizer import load_tokenizer
from l3paper.files import atomic_folder, require_replaceable, sha256
from l3paper.gpt import GPT, GPTConfig
from l3paper.lookup.offload import FileTable, RowStore, offload_tables

TABLES = ("resident", "offloaded", "file")
"""Where the L3 tables of a loaded model are: on its device, in CPU memory, or in their file."""

FILES = ("config.json", "tokenizer.json", "weights.safetensors", "tables.safetensors")
"""A saved model; `sums.json` beside them holds their SHA-256."""

UNUSABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    ValueError,
)
"""What reading a file raises that does not hold what it should."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write the folder, whole or not at all; whatever stands there is replaced."""
    with new_checkpoint(folder) as new:
        write_model(new, model, tokenizer)


def require_place(folder: Path, others: Iterable[Path] = ()) -> None:
    """Raise ValueError, naming it, unless a model can be saved there and nothing else is lost.

    That is a new folder, an empty one, or that of a saved model; none of `others` may be inside.
    """
    folder = folder.absolute()
    known = {*FILES, "sums.json"}
    if folder.exists() and not (folder.is_dir() and {f.name for f in folder.iterdir()} <= known):
        raise ValueError(f"{str(folder)!r} cannot be replaced by a model: it holds something else")
    for other in others:
        if other.absolute().is_relative_to(folder):
            raise ValueError(f"{str(folder)!r} is for a model alone; {str(other)!r} cannot be inside")
    require_replaceable(folder)


@contextmanager
def new_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it moves to `folder` with the SHA-256 of every file in it.

    It appears whole or not at all; whatever stands there is replaced.
    """
    with atomic_folder(folder) as new:
        yield new
        sums = {path.name: sha256(path) for path in sorted(new.iterdir())}
        (new / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")


def require_whole(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a file unlike its SHA-256, FileNotFoundError for one that is missing."""
    sums = json.loads((folder / "sums.json").read_text())
    for name in names:
        if sha256(folder / name) != sums[name]:
            raise ValueError(f"{name} is damaged")


def write_model(
    folder: Path, model: GPT, tokenizer: Tokenizer, state: dict[str, torch.Tensor] | None = None
) -> None:
    """The model's four files, into a folder that is there; `state`, where given, is its state dict."""
    state = {k: tensor.contiguous() for k, tensor in (state or model.state_dict()).items()}
    tables = {name: state.pop(name) for name in model.table_names()}
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_tensors(folder / "weights.safetensors", state)
    write_tensors(folder / "tables.safetensors", tables)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As safetensors; OSError where there is no room for them."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from None


def load_model(folder: Path, device: torch.device, tables: str = "resident") -> tuple[GPT, Tokenizer]:
    """The model, ready for inference on `device`, and its tokenizer, as `save_model` wrote them.

    `tables` is one of TABLES. Every file is checked against its SHA-256, except that tables which are
    to stay in their file are not read for it: their size alone is checked. Raises ValueError, naming
    the folder, where a file is missing, damaged or of another format.
    """
    try:
        return _load(folder, device, tables)
    except FileNotFoundError as error:
        if not folder.exists():
            raise ValueError(f"there is no checkpoint {str(folder)!r}") from None
        name = Path(error.filename).name
        raise ValueError(f"checkpoint {str(folder)!r} is incomplete: there is no {name}") from None
    except UNUSABLE as error:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be used: {error}") from None


def _load(folder: Path, device: torch.device, tables: str) -> tuple[GPT, Tokenizer]:
    require_whole(folder, [name for name in FILES if (tables, name) != ("file", FILES[-1])])
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = GPTConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):  # no weight is made only to be thrown away
        model = GPT(config)
    state = load_file(folder / "weights.safetensors")
    if tables == "file":
        stored = file_tables(folder / "tables.safetensors")
        for name, layer in model.l3_layers.items():
            own = [stored[f"l3_layers.{name}.{table}"] for table in layer.table_names()]
            for held, wanted in zip((own[0], own[-1]), layer.tables(), strict=True):
                if held.shape != wanted.shape:
                    raise ValueError(f"a table of layer {name} is {held.shape}, not {wanted.shape}")
            bounds = state[f"l3_layers.{name}.bounds"]
            layer.serve_from(RowStore(own[0], own[-1], bounds, device))
    else:
        state |= load_file(folder / "tables.safetensors")
    model.load_state_dict(state, assign=True)
    model.set_rotary(torch.device("cpu"))
    if tables == "offloaded":
        offload_tables(model, device)
    return model.to(device).eval(), tokenizer


def file_tables(path: Path) -> dict[str, FileTable]:
    """The matrices of a safetensors file, left where they are.

    The format: the length of a JSON header in 8 bytes, little-endian, the header, then the numbers.
    (https://huggingface.co/docs/safetensors) Raises ValueError for a file of another size than its
    header says, for shapes that do not fit their bytes, and for numbers of a kind that no table has.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError(
                f"{path.name} says that its header has {length:,} bytes; it has not so many"
            )
        header = json.loads(file.read(length))
    start = 8 + length
    found, end = {}, start
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
            if len(shape) != 2 or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path.name} has {last - first:,} bytes for {name} {shape}")
            found[name] = FileTable(path, start + first, shape, dtype)
            end = max(end, start + last)
    if path.stat().st_size != end:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; its header says {end:,}")
    return found
