"""L3 layers in the decoders of Hugging Face transformers: the extra `transformers`.

    model = AutoModelForCausalLM.from_pretrained(name)
    add_l3_layers(model, after_layers=[8], bounds=allocation_to_bounds(rows))
    ... train, generate, model.save_pretrained(folder) ...
    model = from_pretrained(folder)

A layer becomes the submodule `l3` of the decoder layer that it follows. Token ids reach it as an
argument, `token_ids`, that every decoder layer passes along; so gradient checkpointing recomputes with
the ids of its own pass. `generate`, caches, `Trainer` and `save_pretrained` need to know nothing of it.
"""

from collections.abc import Sequence

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from l3paper.layer import L3Layer

FROM = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
"""The options of transformers that say where a folder is read from: configuration and weights alike."""


def add_l3_layers(
    model: PreTrainedModel,
    after_layers: Sequence[int],
    bounds: Tensor,
    d_up: int | None = None,
    tie_kv: bool = True,
) -> PreTrainedModel:
    """Add fresh L3 layers to a loaded decoder and return it; until they are trained, nothing changes.

    Args:
        model: a decoder with a list of layers that pass keyword arguments along, such as Llama, Qwen,
            Gemma or GPT-2; changed in place.
        after_layers: the decoder layers, counted from 0, that an L3 layer follows.
        bounds: which rows every token owns, (vocab_size + 1,); see `l3paper.allocation_to_bounds`.
        d_up, tie_kv: as `L3Layer` takes them; d_up is 4 * n_embd by default.

    The model refuses `inputs_embeds` without `token_ids` from then on. Raises ValueError for a model
    that has no such list, or has L3 layers already, for layers that it does not have, and for bounds
    that are not valid or do not cover the vocabulary.
    """
    if getattr(model.config, "l3", None):
        raise ValueError(f"model has L3 layers already, after layers {model.config.l3['after_layers']}")
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(bounds) <= vocab_size:
        raise ValueError(
            f"bounds cover {len(bounds) - 1} tokens; they must cover the vocabulary of {vocab_size}"
        )
    _attach(model, sorted(after_layers), int(bounds[-1]), d_up, tie_kv, len(bounds) - 1, bounds)
    return model


def l3_layers(model: PreTrainedModel) -> list[L3Layer]:
    """The L3 layers of a model, in the order of its decoder layers."""
    return [layer.l3 for layer in _decoder_layers(model) if hasattr(layer, "l3")]


def grow(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """After `resize_token_embeddings`: give every new token, in every L3 layer, so many rows.

    See `L3Layer.grow`, also for what is raised. An optimizer that exists already does not know the
    larger tables.
    """
    for layer in l3_layers(model):
        layer.grow(rows)
        model.config.l3 |= {"n_emb": layer.n_emb, "vocab_size": len(layer.bounds) - 1}


def from_pretrained(folder: str, **options) -> PreTrainedModel:
    """Load what `save_pretrained` of a model with L3 layers wrote. Options are transformers' own.

    Raises ValueError for a folder whose configuration names no L3 layers, or no class of transformers,
    or whose weights lack the layers.
    """
    config = AutoConfig.from_pretrained(folder, **{k: options[k] for k in FROM if k in options})
    if not getattr(config, "l3", None):
        raise ValueError(
            f"folder is {folder!r}, whose config.json names no L3 layers: see add_l3_layers"
        )
    base = getattr(transformers, (config.architectures or [""])[0], None)
    if base is None:
        raise ValueError(
            f"folder is {folder!r}, whose config.json has architectures = {config.architectures}; the "
            "first must be a class of transformers"
        )

    class WithL3(base):
        def __init__(self, config, *arguments, **options):
            super().__init__(config, *arguments, **options)
            _attach(self, **config.l3)

    options |= {"config": config, "output_loading_info": True}
    model, found = WithL3.from_pretrained(folder, **options)
    if missing := sorted(name for name in found["missing_keys"] if ".l3." in name):
        raise ValueError(f"folder is {folder!r}, whose weights lack {missing[0]}")
    model.__class__ = base  # the layers are the model's own now, and a class made here has no address
    return model


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    for name in ("layers", "h"):
        layers = getattr(model.base_model, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"model is a {type(model).__name__}, which has no list of decoder layers")


def _attach(
    model: PreTrainedModel,
    after_layers: list[int],
    n_emb: int,
    d_up: int | None,
    tie_kv: bool,
    vocab_size: int,
    bounds: Tensor | None = None,
) -> None:
    layers, width = _decoder_layers(model), model.get_input_embeddings().embedding_dim
    if len(set(after_layers)) < len(after_layers) or not set(after_layers) <= set(range(len(layers))):
        raise ValueError(
            f"after_layers are {after_layers}; choose different ones of 0 .. {len(layers) - 1}"
        )
    d_up = 4 * width if d_up is None else d_up
    sizes = {"n_emb": n_emb, "d_up": d_up, "tie_kv": tie_kv, "vocab_size": vocab_size}
    likes = [next(layers[i].parameters()) for i in after_layers]
    made = [
        L3Layer(width, **sizes, bounds=bounds, device=like.device, dtype=like.dtype) for like in likes
    ]
    for i, layer in zip(after_layers, made, strict=True):  # all are made, so none is attached alone
        layers[i].l3 = layer
        layers[i].register_forward_hook(_add_delta, with_kwargs=True)
    model.base_model.register_forward_pre_hook(_pass_ids, with_kwargs=True)
    model.config.l3 = {"after_layers": after_layers, **sizes}


def _pass_ids(decoder: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    ids = options.get("token_ids", options.get("input_ids", arguments[0] if arguments else None))
    if ids is None:
        raise ValueError(
            "L3 layers look rows up by token id: give input_ids, or token_ids beside inputs_embeds"
        )
    return arguments, {**options, "token_ids": ids}


def _add_delta(layer: nn.Module, arguments: tuple, options: dict, output):
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    ids = options["token_ids"].to(hidden.device).view(hidden.shape[:-1])
    hidden = hidden + layer.l3(hidden, ids)
    return (hidden, *rest) if isinstance(output, tuple) else hidden
