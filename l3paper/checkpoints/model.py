"""A trained model as a folder: configuration, tokenizer, weights, and the L3 tables by themselves.

The tables have a file of their own, which can stay where it is while the model runs. A folder that is
loaded may come from a stranger: see `l3paper.checkpoints.stored`. Its `sums.json` shows damage and does
not authenticate.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from l3paper.checkpoints.stored import (
    MOST_JSON,
    file_tables,
    read_json,
    read_tensors,
    readable,
    require_intact,
    require_state,
)
from l3paper.data.tokenizer import parse_tokenizer
from l3paper.errors import at_most, one_of
from l3paper.files import atomic_folder, require_replaceable, sha256
from l3paper.gpt import GPT, GPTConfig
from l3paper.lookup.offload import FileTable, RowStore, offload_tables

TABLES = ("resident", "offloaded", "file")
"""Where the L3 tables of a loaded model are: on its device, in CPU memory, or in their file."""

FILES = ("config.json", "tokenizer.json", "weights.safetensors", "tables.safetensors")
"""A saved model; `sums.json` beside them holds their SHA-256."""

CONFIG, TOKENIZER, WEIGHTS, L3_TABLES = FILES

MOST_ANGLES = 2**27
"""For sequence_len * head_dim, which no stored weight confirms: a million tokens for heads of 128."""


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write the folder, whole or not at all; whatever stands there is replaced.

    Raises ValueError for what `load_model` would refuse: a tokenizer of another size, an L3 layer
    without valid bounds, or whose rows come from a store, and weights of more than one type.
    """
    require_tokenizer(tokenizer.to_str(), model.config)
    for layer in model.l3_layers.values():
        layer.bounds_id()
        layer.tables()
    kinds = {str(weight.dtype) for weight in model.parameters()}
    if len(kinds) > 1:
        raise ValueError(
            f"the model's weights are {', '.join(sorted(kinds))}; convert them to one type"
        )
    with new_checkpoint(folder) as new:
        write_model(new, model, tokenizer)


def require_place(folder: Path, others: Iterable[Path] = ()) -> None:
    """Raise ValueError, naming it, unless a model can be saved there and nothing else is lost.

    The folder must be new, empty, or that of a saved model; none of `others` may be inside.
    """
    target = Path(os.path.realpath(folder))
    known = {*FILES, "sums.json"}
    if target.exists() and not (target.is_dir() and {f.name for f in target.iterdir()} <= known):
        raise ValueError(f"{str(folder)!r} cannot be replaced by a model: it holds something else")
    for other in others:
        if Path(os.path.realpath(other)).is_relative_to(target):
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


def write_model(
    folder: Path, model: GPT, tokenizer: Tokenizer, state: dict[str, Tensor] | None = None
) -> None:
    """Write the model's four files into an existing folder; `state` is its state dict if given."""
    state = {k: tensor.contiguous() for k, tensor in (state or model.state_dict()).items()}
    tables = {name: state.pop(name) for name in model.table_names()}
    (folder / CONFIG).write_text(json.dumps(asdict(model.config), indent=1) + "\n")
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    write_tensors(folder / WEIGHTS, state)
    write_tensors(folder / L3_TABLES, tables)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError if there is no room for it."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library lets nobody else read it


def load_model(folder: Path, device: torch.device, tables: str = "resident") -> tuple[GPT, Tokenizer]:
    """The model, ready for inference on `device`, and its tokenizer, as `save_model` wrote them.

    `tables` is one of TABLES. Every file is checked against its SHA-256, except for tables that stay in
    their file: only their header is read. Raises ValueError, naming the folder, if a file is missing,
    damaged, or does not hold what `save_model` writes.
    """
    one_of(TABLES, tables=tables)
    if not folder.exists():
        raise ValueError(f"there is no checkpoint {str(folder)!r}")
    try:
        return _load(folder, device, tables)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be used: {error}") from error


def _load(folder: Path, device: torch.device, tables: str) -> tuple[GPT, Tokenizer]:
    config, tokenizer = read_description(folder)
    state = read_tensors(folder / WEIGHTS)
    held = (file_tables if tables == "file" else read_tensors)(folder / L3_TABLES)
    model = empty_model(config, state, held)
    require_intact(folder, (WEIGHTS,) if tables == "file" else (WEIGHTS, L3_TABLES))
    set_bounds(model, state)
    if tables == "file":
        for name, layer in model.l3_layers.items():
            own = [held[f"l3_layers.{name}.{table}"] for table in layer.table_names()]
            layer.serve_from(RowStore(own[0], own[-1], state[f"l3_layers.{name}.bounds"], device))
    else:
        state |= held
    model.load_state_dict(state, assign=True)
    model.set_constants(torch.device("cpu"))
    if tables == "offloaded":
        offload_tables(model, device)
    return model.to(device).eval(), tokenizer


def read_description(folder: Path) -> tuple[GPTConfig, Tokenizer]:
    """Read a saved model's sizes and tokenizer, checked against their SHA-256, without its weights."""
    require_intact(folder, (CONFIG, TOKENIZER))
    config = read_config(folder / CONFIG)
    with readable(folder / TOKENIZER, MOST_JSON):
        text = (folder / TOKENIZER).read_bytes()
    return config, require_tokenizer(text, config)


def read_config(path: Path) -> GPTConfig:
    """The sizes of a saved model; those that the file lacks are GPTConfig's defaults.

    Raises ValueError for names that GPTConfig does not have, for values that it refuses, and for a
    sequence_len whose rotary angles would take gigabytes.
    """
    sizes, defaults = read_json(path), asdict(GPTConfig())
    if unknown := sizes.keys() - defaults.keys():
        raise ValueError(f"{path.name} has {min(unknown)!r:.80}, which is not a setting of a model")
    config = GPTConfig(**sizes)
    at_most(MOST_ANGLES // config.head_dim, sequence_len=config.sequence_len)
    return config


def require_tokenizer(text: str | bytes, config: GPTConfig) -> Tokenizer:
    """Parse a serialized tokenizer. Raises ValueError if it is not of this package's kind and size."""
    tokenizer = parse_tokenizer(text, TOKENIZER)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"{TOKENIZER} has {tokenizer.get_vocab_size()} tokens; "
            f"the model's vocab_size is {config.vocab_size}"
        )
    return tokenizer


def empty_model(
    config: GPTConfig, weights: dict[str, Tensor], tables: dict[str, Tensor] | dict[str, FileTable]
) -> GPT:
    """A model on the meta device, for the tensors of two files, all in the embedding's type.

    Raises ValueError, naming a tensor, unless the files hold exactly the tensors of the model.
    """
    # Without this, n_layer and n_experts could make even a model without weights too large to build.
    least = config.n_layer * (1 + config.n_experts)
    if least > len(weights):
        raise ValueError(
            f"n_layer = {config.n_layer} and n_experts = {config.n_experts} need at least {least} "
            f"tensors; {WEIGHTS} has {len(weights)}"
        )
    with torch.device("meta"):
        model = GPT(config)
    embedding = weights.get("wte.weight")
    if embedding is not None and embedding.dtype.is_floating_point:
        model.to(embedding.dtype)
    state = model.state_dict()
    require_state(tables, {name: state.pop(name) for name in model.table_names()})
    require_state(weights, state)
    return model


def set_bounds(model: GPT, state: dict[str, Tensor]) -> None:
    """Set every L3 layer's bounds from a state dict. Raises ValueError if they are not valid."""
    for name, layer in model.l3_layers.items():
        layer.set_bounds(state[f"l3_layers.{name}.bounds"])
