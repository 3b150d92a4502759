"""What trained models have stored, recorded: `python -m l3paper.insight`.

Trains a dense model, one with two L3 layers, and two controls with other layers in their places, and
looks into each: a tuned lens, the layers' choices on held-out text, how many of their rows are dead as
training goes on, and, for a few tokens, what their rows hold.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from l3paper.data.batches import require_length, training_batch
from l3paper.data.sources import corpus_name
from l3paper.data.streams import TokenizedCorpus
from l3paper.data.tokenizer import token_text
from l3paper.errors import at_least, command, nonempty_path
from l3paper.experiments.catalogue import DENSE, PER_LAYER_LR, SMALL, Changes, spread
from l3paper.experiments.runs import MissingRun, check_run
from l3paper.files import require_writable
from l3paper.gpt import GPT
from l3paper.insight.lens import train_lens
from l3paper.insight.rows import Choice, choices, explore
from l3paper.records import RECORDS, read_record, write_record
from l3paper.train import TrainedRun, Training, train
from l3paper.training.config import PRESETS, TrainConfig

PROGRAM = "python -m l3paper.insight"

FOLDER = RECORDS / "insight"
MODELS: dict[str, Changes] = {
    "dense": DENSE,
    "l3": {},
    "mlp": {"stand_in": "mlp"},
    "per-layer-embedding": {"stand_in": "per-layer-embedding", "table_lr": PER_LAYER_LR},
}
"""The models by name, as changes of the one with two L3 layers. The last two are controls: MLPs, or one
row per token, in the same places and of equal FLOPs."""

LENS_STEPS = {"smoke": 20, "laptop": 500, "gpu": 1000}
SEEDS = 3
TOKENS = 5
"""How many tokens the explorer shows."""


def held_out_ids(corpus: TokenizedCorpus, length: int, most: int = 32768) -> Tensor:
    """About the first `most` tokens of the held-out text, as sequences (B, length)."""
    require_length(corpus.validation, length, "held-out text")
    sequences = max(1, min(most, len(corpus.validation) - 1) // length)
    return torch.from_numpy(corpus.validation[: sequences * length].astype(np.int64)).view(-1, length)


def train_and_look(config: TrainConfig, lens_steps: int) -> dict:
    """Train a model, count its dead rows at every evaluation, and look into it at the end."""
    dead: list[dict] = []

    def count(run: Training, step: int) -> None:
        if run.model.l3_layers and step % config.eval_every == 0:
            dead.append(_dead_rows(run.model, held_out_ids(run.corpus, config.sequence_len), step))

    run = train(config, show_progress=False, before_step=count)
    idx = held_out_ids(run.corpus, config.sequence_len)
    dead.append(_dead_rows(run.model, idx, config.num_iterations))
    return record_insight(run, lens_steps) | {"dead_rows": dead}


def _dead_rows(model: GPT, idx: Tensor, step: int) -> dict:
    by_block = {str(block): choice.dead_rows() for block, choice in choices(model, idx).items()}
    return {"step": step, "dead_and_all": by_block}


def record_insight(run: TrainedRun, lens_steps: int, held_out: int = 32768) -> dict:
    """Look into a trained model, on the first `held_out` tokens of the held-out text."""
    model, corpus, config = run.model, run.corpus, run.record["config"]
    length, batch_size = config["sequence_len"], config["batch_size"]
    idx = held_out_ids(corpus, length, held_out)
    seed = config["seed"] + 10**6  # other places of the text than the model was trained on
    batches = (training_batch(corpus.train, batch_size, length, seed, step)[0] for step in count())
    lens = train_lens(model, batches, lens_steps)
    with torch.no_grad():
        by_batch = [lens(part) for part in idx.split(batch_size)]
    by_block = choices(model, idx)
    return {
        "lens": {name: float(torch.cat([kl[name] for kl in by_batch]).mean()) for name in by_batch[0]},
        "choices": {str(block): {"of_frequent": _parts(choice)} for block, choice in by_block.items()},
        "explorer": [
            _explored(model, corpus, block, token, idx)
            for block in by_block
            for token in frequent_words(corpus, model, idx)
        ],
        **{key: run.record[key] for key in ("config", "corpus", "environment", "model", "evaluations")},
    }


def _parts(choice: Choice, least_positions: int = 20) -> dict:
    """The two parts of the mean distance, over frequent tokens of several rows.

    Rarer ones are left out: with few positions, the mean softmax is close to every single one, so that
    almost nothing would count as context.
    "rows_used" is the exponential of the entropy of a token's mean softmax, averaged over positions.
    """
    counts = choice.token_ids.bincount()[choice.token_ids]
    here = (choice.rows > 1) & (counts >= least_positions)
    rows_used = (choice.rows.log() - choice.bias).exp()
    measured = {"rows": choice.rows.float(), "rows_used": rows_used}
    measured |= {name: getattr(choice, name) for name in ("distance", "bias", "information")}
    return {name: float(values[here].mean()) for name, values in measured.items()}


def frequent_words(corpus: TokenizedCorpus, model: GPT, idx: Tensor) -> list[int]:
    """The tokens that the explorer shows: the commonest words in the text with four rows or more.

    A word has three letters or more, and nothing else except a space before it. At most TOKENS words,
    commonest first.
    """
    layer = next(iter(model.l3_layers.values()))
    rows = layer.bounds.diff()
    counts = idx.flatten().bincount(minlength=corpus.vocab_size)
    words = []
    for token in counts.argsort(descending=True).tolist():
        text = corpus.tokenizer.decode([token]).removeprefix(" ")
        if counts[token] and rows[token] >= 4 and len(text) >= 3 and text.isalpha():
            words.append(token)
    return words[:TOKENS]


def _explored(model: GPT, corpus: TokenizedCorpus, block: int, token: int, idx: Tensor) -> dict:
    rows = [
        {
            "mean_weight": row.mean_weight,
            "contexts": [
                [weight, corpus.tokenizer.decode(idx[sequence, max(0, end - 7) : end + 1].tolist())]
                for weight, sequence, end in row.contexts
            ],
            "promotes": [token_text(corpus.tokenizer, promoted) for promoted in row.promotes],
        }
        for row in explore(model, block, token, idx)
    ]
    return {"block": block, "token": token_text(corpus.tokenizer, token), "rows": rows}


def insights(
    preset: str = "laptop",
    seeds: int = SEEDS,
    folder: Path = FOLDER,
    data: str = "stdlib",
    models: Sequence[str] = ("dense", "l3"),
) -> dict[str, list[dict]]:
    """The recorded looks into each model, by seed.

    Raises MissingRun if a record is missing or of another text, ValueError if one is of another
    configuration.
    """
    looks = {name: [] for name in models}
    for look in _looks(preset, seeds, folder, data, models):
        if not look.path.exists():
            command = f"{PROGRAM} --preset {preset} --data {data!r}"
            raise MissingRun(f"there is no {look.path.name}: run {command}")
        looks[look.model].append(look.read())
    return looks


def lens_drops(look: dict) -> dict[str, float]:
    """By how many nats the lens falls from each depth to the next, which gives the drop its name."""
    depths = list(look["lens"].items())
    return {name: before - after for (_, before), (name, after) in pairwise(depths)}


class _Look(NamedTuple):
    """A look into one model: where its record is, and how the model is trained."""

    model: str
    path: Path
    config: TrainConfig

    def read(self) -> dict:
        record = read_record(self.path)
        check_run(str(self.path), record, self.config)
        recorded, wanted = record["config"]["data"], corpus_name(self.config.data)
        if recorded != wanted:
            raise MissingRun(
                f"{self.path} is of a model of {recorded!r}, not {wanted!r}: use another --folder"
            )
        return record


def _looks(
    preset: str, seeds: int, folder: Path, data: str, models: Sequence[str] = tuple(MODELS)
) -> list[_Look]:
    base = replace(SMALL[preset], data=data)
    base = replace(base, l3_after_layers=spread(base, 2))
    return [
        _Look(
            name,
            folder / f"{preset}-{name}-seed{seed}.json",
            replace(base, **MODELS[name], seed=seed),
        )
        for seed in range(seeds)
        for name in models
    ]


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train and look into models with and without L3 layers. Records that exist are not "
        "made again.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="(default: laptop)")
    parser.add_argument("--data", default="stdlib", help="as for l3paper.train (default: stdlib)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"(default: {SEEDS})")
    parser.add_argument(
        "--folder", type=nonempty_path, default=FOLDER, help="(default: figures/data/insight)"
    )
    flags = parser.parse_args(arguments)
    at_least(1, seeds=flags.seeds)
    require_writable(flags.folder / "any")
    looks = _looks(flags.preset, flags.seeds, flags.folder, flags.data)
    for look in tqdm(looks, desc="insight", unit="run"):
        if look.path.exists():
            look.read()
        else:
            write_record(look.path, train_and_look(look.config, LENS_STEPS[flags.preset]))
    return 0
