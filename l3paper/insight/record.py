"""What trained models have stored, recorded: `python -m l3paper.insight`.

Trains the dense model and the one with two L3 layers of the main comparison, and looks into each: a
tuned lens, the layers' choices on held-out text, and, for a few tokens, what their rows hold.
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
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.runs import MissingRun, check_run
from l3paper.gpt import GPT
from l3paper.insight.lens import train_lens
from l3paper.insight.rows import Choice, choices, explore
from l3paper.records import RECORDS, read_record, write_record
from l3paper.train import TrainedRun, train
from l3paper.training.config import PRESETS, TrainConfig

PROGRAM = "python -m l3paper.insight"

FOLDER = RECORDS / "insight"
MODELS = {"dense": "dense", "l3": "L3, two layers"}
"""Names of the models in the records, and in the main comparison."""

LENS_STEPS = {"smoke": 20, "laptop": 500, "gpu": 1000}
SEEDS = 3
TOKENS = 5
"""How many tokens the explorer shows."""


def record_insight(run: TrainedRun, lens_steps: int, held_out: int = 32768) -> dict:
    """Look into a trained model, on the first `held_out` tokens of the held-out text."""
    model, corpus, config = run.model, run.corpus, run.record["config"]
    length, batch_size = config["sequence_len"], config["batch_size"]
    require_length(corpus.validation, length, "held-out text")
    sequences = max(1, min(held_out, len(corpus.validation) - 1) // length)
    tokens = corpus.validation[: sequences * length].astype(np.int64)
    idx = torch.from_numpy(tokens).view(sequences, length)
    seed = config["seed"] + 10**6  # other places of the text than the model was trained on
    batches = (training_batch(corpus.train, batch_size, length, seed, step)[0] for step in count())
    lens = train_lens(model, batches, lens_steps)
    with torch.no_grad():
        by_batch = [lens(part) for part in idx.split(batch_size)]
    by_block = choices(model, idx)
    return {
        "lens": {name: float(torch.cat([kl[name] for kl in by_batch]).mean()) for name in by_batch[0]},
        "choices": {str(block): _summary(choice, corpus) for block, choice in by_block.items()},
        "explorer": [
            _explored(model, corpus, block, token, idx)
            for block in by_block
            for token in frequent_words(corpus, model, idx)
        ],
        **{key: run.record[key] for key in ("config", "corpus", "environment", "model", "evaluations")},
    }


def _summary(choice: Choice, corpus: TokenizedCorpus) -> dict:
    """Mean distances from uniform: of all positions, by number of rows, and of the top fifty tokens.

    Positions whose token owns a single row have no choice; they count only by number of rows.
    """
    by_rows = []
    for rows in choice.rows.unique().tolist():
        here = choice.rows == rows
        by_rows.append([rows, int(here.sum()), float(choice.distance[here].mean())])
    several = choice.rows > 1
    share = choice.distance[several] / choice.rows[several].log()
    tokens, counts = choice.token_ids[several].unique(return_counts=True)
    by_token = []
    for place in counts.argsort(descending=True)[:50].tolist():
        here = choice.token_ids == tokens[place]
        text = token_text(corpus.tokenizer, int(tokens[place]))
        mean = float(choice.distance[here].mean())
        by_token.append([text, int(choice.rows[here][0]), int(counts[place]), mean])
    return {
        "mean": float(choice.distance[several].mean()),
        "share_of_most": float(share.mean()),
        "positions": int(several.sum()),
        "by_rows": by_rows,
        "by_token": by_token,
    }


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
    preset: str = "laptop", seeds: int = SEEDS, folder: Path = FOLDER, data: str = "stdlib"
) -> dict[str, list[dict]]:
    """The recorded looks into each model, by seed.

    Raises MissingRun if a record is missing, ValueError if one is of another configuration or text.
    """
    looks = {name: [] for name in MODELS}
    for look in _looks(preset, seeds, folder, data):
        if not look.path.exists():
            raise MissingRun(f"there is no {look.path.name}: run {PROGRAM} --preset {preset}")
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
            raise ValueError(
                f"{self.path} is of a model of {recorded!r}, not {wanted!r}: use another --folder"
            )
        return record


def _looks(preset: str, seeds: int, folder: Path, data: str) -> list[_Look]:
    configs = EXPERIMENTS["main"].configs(preset, data)
    return [
        _Look(name, folder / f"{preset}-{name}-seed{seed}.json", replace(configs[family], seed=seed))
        for seed in range(seeds)
        for name, family in MODELS.items()
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
    looks = _looks(flags.preset, flags.seeds, flags.folder, flags.data)
    for look in tqdm(looks, desc="insight", unit="run"):
        if look.path.exists():
            look.read()
        else:
            run = train(look.config, show_progress=False)
            write_record(look.path, record_insight(run, LENS_STEPS[flags.preset]))
    return 0
