"""What trained models have stored, recorded: `python -m l3paper.insight`.

Trains the dense model and the one with two L3 layers of the main comparison, and looks into each: a
tuned lens, the layers' choices on held-out text, and, for a few tokens, what their rows hold.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from l3paper.data.streams import (
    TokenizedCorpus,
    corpus_name,
    require_length,
    training_batch,
    validation_batches,
)
from l3paper.data.tokenizer import token_text
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.runs import MissingRun, read_run
from l3paper.gpt import GPT
from l3paper.insight.lens import train_lens
from l3paper.insight.rows import Choice, choices, explore
from l3paper.records import RECORDS, write_record
from l3paper.train import TrainedRun, train
from l3paper.training.config import PRESETS, TrainConfig

FOLDER = RECORDS / "insight"
MODELS = {"dense": "dense", "l3": "L3, two layers"}
"""Names in the records, and in the main comparison."""

LENS_STEPS = {"smoke": 20, "laptop": 500, "gpu": 1000}
SEEDS = 3
TOKENS = 5
"""How many tokens the explorer shows."""


def record_insight(run: TrainedRun, lens_steps: int, held_out: int = 32768) -> dict:
    """Look into a trained model, on the first `held_out` tokens of the held-out text."""
    model, corpus, settings = run.model, run.corpus, run.record["config"]
    length = settings["sequence_len"]
    require_length(corpus.validation, length)
    texts = validation_batches(corpus.validation, settings["batch_size"], length)
    whole = torch.cat([inputs[(targets >= 0).all(dim=1)] for inputs, targets in texts])
    idx = whole[: max(1, held_out // length)]  # (sequences, length)
    lens = train_lens(model, _batches(corpus, settings), lens_steps)
    with torch.no_grad():
        by_batch = [lens(part) for part in idx.split(settings["batch_size"])]
    depths = {name: torch.cat([found[name] for found in by_batch]) for name in by_batch[0]}
    found = choices(model, idx)
    return {
        "lens": {name: float(divergence.mean()) for name, divergence in depths.items()},
        "choices": {str(block): _summary(choice, corpus) for block, choice in found.items()},
        "explorer": [
            _explored(model, corpus, block, token, idx)
            for block in found
            for token in frequent_words(corpus, model, idx)
        ],
        **{key: run.record[key] for key in ("config", "corpus", "environment", "model", "evaluations")},
    }


def _batches(corpus: TokenizedCorpus, settings: dict) -> Iterator[Tensor]:
    for step in itertools.count():
        seed = settings["seed"] + 10**6  # other places than the model was trained on
        yield training_batch(
            corpus.train, settings["batch_size"], settings["sequence_len"], seed, step
        )[0]


def _summary(choice: Choice, corpus: TokenizedCorpus) -> dict:
    """Means over positions: all, by the number of rows, and by token (the commonest fifty)."""
    most = choice.rows.float().log().clamp(min=1e-9)
    share = choice.distance / most  # of what it could be at most
    several = choice.rows > 1
    by_rows = []
    for rows in choice.rows.unique().tolist():
        here = choice.rows == rows
        by_rows.append([rows, int(here.sum()), float(choice.distance[here].mean())])
    tokens, counts = choice.token_ids[several].unique(return_counts=True)
    by_token = []
    for place in counts.argsort(descending=True)[:50].tolist():
        here = choice.token_ids == tokens[place]
        text = token_text(corpus.tokenizer, int(tokens[place]))
        mean = float(choice.distance[here].mean())
        by_token.append([text, int(choice.rows[here][0]), int(counts[place]), mean])
    return {
        "mean": float(choice.distance[several].mean()),
        "share_of_most": float(share[several].mean()),
        "positions": int(several.sum()),
        "by_rows": by_rows,
        "by_token": by_token,
    }


def frequent_words(corpus: TokenizedCorpus, model: GPT, idx: Tensor) -> list[int]:
    """The rule by which tokens are shown: the commonest in the text that are words with four rows.

    A word has three letters or more and nothing else, but for a space before it; "four rows" means
    four or more. At most TOKENS of them, commonest first.
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
    def context(sequence: int, position: int) -> str:
        before = idx[sequence, max(0, position - 7) : position + 1]
        return corpus.tokenizer.decode(before.tolist())

    rows = explore(model, block, token, idx)
    return {
        "block": block,
        "token": token_text(corpus.tokenizer, token),
        "rows": [
            {
                "mean_weight": row.mean_weight,
                "contexts": [[o.weight, context(o.sequence, o.position)] for o in row.contexts],
                "promotes": [token_text(corpus.tokenizer, t) for t in row.promotes],
            }
            for row in rows
        ],
    }


def insights(
    preset: str = "laptop", seeds: int = SEEDS, folder: Path = FOLDER, data: str = "stdlib"
) -> dict[str, list[dict]]:
    """The recorded looks into each model, by seed.

    Raises MissingRun where one is missing, ValueError where one is of another configuration or text.
    """
    looks = {name: [] for name in MODELS}
    for (name, _), (path, config) in _wanted(preset, seeds, folder, data).items():
        if not path.exists():
            raise MissingRun(
                f"there is no {path.name}: run python -m l3paper.insight --preset {preset}"
            )
        looks[name].append(_read(path, config))
    return looks


def lens_drops(look: dict) -> dict[str, float]:
    """By how many nats the lens falls with every step from one depth to the next."""
    depths = list(look["lens"].items())
    return {name: before - after for (_, before), (name, after) in itertools.pairwise(depths)}


def _wanted(
    preset: str, seeds: int, folder: Path, data: str
) -> dict[tuple[str, int], tuple[Path, TrainConfig]]:
    """By model and seed: where its record belongs, and how it is trained."""
    configs = EXPERIMENTS["main"].configs(preset, data)
    return {
        (name, seed): (
            folder / f"{preset}-{name}-seed{seed}.json",
            replace(configs[MODELS[name]], seed=seed),
        )
        for seed in range(seeds)
        for name in MODELS
    }


def _read(path: Path, config: TrainConfig) -> dict:
    record = read_run(path, config)
    made_on, wanted = record["config"]["data"], corpus_name(config.data)
    if made_on != wanted:
        raise ValueError(f"{path} is of a model of {made_on!r}, not {wanted!r}: use another --folder")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.insight",
        description="Train and look into models with and without L3 layers; records that are there "
        "already are not made again.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="(default: laptop)")
    parser.add_argument("--data", default="stdlib", help="as of l3paper.train (default: stdlib)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"(default: {SEEDS})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: figures/data/insight)")
    given = parser.parse_args(arguments)
    try:
        if given.seeds < 1:
            raise ValueError(f"seeds is {given.seeds}; it must be at least 1")
        wanted = _wanted(given.preset, given.seeds, given.folder, given.data)
        for path, config in tqdm(wanted.values(), desc="insight", unit="run"):
            if path.exists():
                _read(path, config)
            else:
                run = train(config, show_progress=False)
                write_record(path, record_insight(run, LENS_STEPS[given.preset]))
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
