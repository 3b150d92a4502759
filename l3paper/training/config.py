"""The settings of a training run: defaults, presets, and their command-line flags."""

import argparse
import math
import os
from dataclasses import dataclass, field, fields, replace
from typing import get_args

from l3paper.allocation import ALLOCATIONS
from l3paper.costs.equal import STAND_INS
from l3paper.errors import at_least, at_most, of_type, one_of
from l3paper.gpt import GPTConfig
from l3paper.parts.variants import VARIANTS


def _option(default, help, least=-math.inf):
    return field(default=default, metadata={"help": help, "least": least})


MOST = 2**31 - 1
"""The most that any integer of a configuration may be."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the laptop preset; the help texts are the command line's."""

    data: str = _option("stdlib", "stdlib, a .txt/.jsonl/.parquet file or folder, or hf:NAME[:CONFIG]")
    data_bytes: int | None = _option(None, "read only that many bytes of text; hf: needs it", least=1)
    vocab_size: int = _option(4096, "tokens of the byte-level BPE")
    depth: int = _option(4, "decoder blocks", least=1)
    n_embd: int = _option(0, "width; 0 for 32 per block", least=0)
    n_head: int = _option(0, "attention heads; 0 for one per 32 of the width", least=0)
    n_kv_head: int = _option(0, "heads of keys and values; 0 for n_head", least=0)
    sequence_len: int = _option(128, "tokens the model sees at once", least=1)
    batch_size: int = _option(16, "sequences per step", least=1)
    accumulate: int = _option(1, "passes per step, each with an equal part of the batch", least=1)
    num_iterations: int = _option(1000, "steps", least=1)
    l3_after_layers: str | None = _option(
        None, "blocks, from 0, that an L3 layer follows: '1,3'; '' for none; by default depth // 2"
    )
    l3_n_emb: int = _option(0, "rows of each L3 table; 0 for 4 per token of the vocabulary", least=0)
    l3_d_up: int = _option(0, "width after the up-projection; 0 for 4 * n_embd")
    l3_k_max: int = _option(64, "most rows one token may own")
    l3_untied: bool = _option(False, "separate tables for keys and values")
    l3_d_emb: int = _option(0, "width of a value row when untied; 0 for n_embd")
    l3_allocation: str = _option("lzw", f"who gets the rows: {', '.join(ALLOCATIONS)}")
    l3_variant: str = _option("", f"change the layer: {', '.join(filter(None, VARIANTS))}")
    stand_in: str = _option(
        "", f"train, in place of this L3 model, its equal in FLOPs: {', '.join(STAND_INS)}"
    )
    init_from: str | None = _option(
        None, "start from the model in this folder, made by --save; layers it lacks are fresh"
    )
    lr_scale: float = _option(1.0, "factor on all learning rates")
    table_lr: float = _option(0.003, "learning rate of the L3 tables, at width 768")
    router_lr: float = _option(0.01, "learning rate of the routers of an MoE, at width 768")
    clip: float = _option(0.0, "largest norm of all gradients together; 0 for no limit")
    overfit_batch: bool = _option(False, "train on the first batch at every step, to find faults")
    eval_every: int = _option(100, "steps between evaluations on the held-out documents", least=1)
    eval_tokens: int = _option(
        32768, "held-out tokens each of those takes; the last takes all", least=1
    )
    seed: int = _option(0, "seed of the initialisation and the batches", least=0)
    shard: bool = _option(False, "under torchrun: divide the L3 tables among the processes by rows")
    compile: bool = _option(
        False, "compile blocks, L3 layers and the loss: faster on a GPU, slow to start"
    )
    device: str = _option("auto", "cpu, cuda, or auto for whichever is there; CUDA runs in bfloat16")

    def __post_init__(self):
        of_type(self)
        settings = vars(self)
        if not self.data:
            raise ValueError("data is empty; name a file, a folder, 'stdlib' or 'hf:NAME'")
        if self.init_from == "":
            raise ValueError("init_from is empty; name the folder of a saved model")
        at_most(MOST, **{name: value for name, value in settings.items() if isinstance(value, int)})
        for option in fields(self):
            if type(settings[option.name]) is int:
                at_least(option.metadata["least"], **{option.name: settings[option.name]})
        for name, most in (("lr_scale", 1e30), ("table_lr", 1e3), ("router_lr", 1e3)):
            if not 0 < settings[name] <= most:
                raise ValueError(
                    f"{name} is {settings[name]}; it must be above 0 and finite, at most {most:g}"
                )
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"clip is {self.clip}; it must be at least 0 and finite")
        one_of(ALLOCATIONS, l3_allocation=self.l3_allocation)
        one_of(("", *STAND_INS), stand_in=self.stand_in)
        model = self.model_config()  # which has checks of its own
        if model.l3_blocks and model.l3_n_emb > self.vocab_size * self.l3_k_max:
            raise ValueError(
                f"l3_k_max is {self.l3_k_max}; so {self.vocab_size} tokens cannot own "
                f"l3_n_emb = {model.l3_n_emb} rows"
            )
        if not model.l3_blocks and self.stand_in:
            raise ValueError(f"stand_in is {self.stand_in!r}, but there is no L3 model to stand in for")

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one step, all passes and processes together."""
        return self.batch_size * self.sequence_len

    @property
    def kind(self) -> str:
        """The kind of model, for file names: dense, l3, or the model that stands in for L3."""
        return self.stand_in or ("l3" if self.model_config().l3_blocks else "dense")

    def model_config(self) -> GPTConfig:
        """The model this run trains, or that another stands in for."""
        n_embd = self.n_embd or 32 * self.depth
        n_head = self.n_head or max(1, n_embd // 32)
        after = str(self.depth // 2) if self.l3_after_layers is None else self.l3_after_layers
        return GPTConfig(
            sequence_len=self.sequence_len,
            vocab_size=self.vocab_size,
            n_layer=self.depth,
            n_head=n_head,
            n_kv_head=self.n_kv_head or n_head,
            n_embd=n_embd,
            l3_after_layers=after,
            l3_n_emb=(self.l3_n_emb or 4 * self.vocab_size) if after else 0,
            l3_d_up=self.l3_d_up,
            l3_k_max=self.l3_k_max,
            l3_tie_kv=not self.l3_untied,
            l3_d_emb=self.l3_d_emb,
            l3_variant=self.l3_variant,
        )


PRESETS = {
    "smoke": TrainConfig(
        depth=2, n_embd=64, batch_size=8, num_iterations=80, eval_every=20, eval_tokens=8192
    ),
    "laptop": TrainConfig(),
    "gpu": TrainConfig(
        vocab_size=32768,
        depth=12,
        n_embd=768,
        n_head=6,
        sequence_len=1024,
        batch_size=64,
        accumulate=2,
        num_iterations=5000,
        l3_n_emb=262144,
        l3_k_max=512,
        eval_every=250,
        eval_tokens=2**20,
        compile=True,
    ),
}


def preset_name(default: str = "smoke") -> str:
    """Return $L3_PRESET, or `default` if that is unset or empty; ValueError if it is not a preset."""
    name = os.environ.get("L3_PRESET") or default
    one_of(list(PRESETS), L3_PRESET=name)
    return name


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` a flag for every field of TrainConfig, and --preset for their defaults.

    Flags that were not given stay out of the namespace, so that the preset can speak for them.
    """
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=preset_name("laptop"),
        help="where the defaults of the flags below come from (default: $L3_PRESET or laptop)",
    )
    for option in fields(TrainConfig):
        flag = "--" + option.name.replace("_", "-")
        text = option.metadata["help"]
        if option.type is bool:
            negatable = argparse.BooleanOptionalAction  # or nobody could turn off what a preset has on
            parser.add_argument(flag, action=negatable, default=argparse.SUPPRESS, help=text)
            continue
        (kind,) = {*get_args(option.type), option.type} & {int, float, str}
        parser.add_argument(
            flag,
            type=kind,
            metavar={int: "N", float: "X", str: "TEXT"}[kind],
            default=argparse.SUPPRESS,
            help=text + (f" (laptop: {option.default})" if option.default is not None else ""),
        )


def from_flags(given: argparse.Namespace) -> TrainConfig:
    """The configuration that flags parsed with `add_flags` describe.

    Raises ValueError for values that are out of range or do not fit together.
    """
    names = {option.name for option in fields(TrainConfig)}
    chosen = {name: value for name, value in vars(given).items() if name in names}
    return replace(PRESETS[given.preset], **chosen)
