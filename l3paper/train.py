"""Train a GPT, dense or with L3 layers: `python -m l3paper.train --help`."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from l3paper.accounting import STAND_INS, Accounting, account, weighted_mean_rows
from l3paper.allocation import ALLOCATIONS, allocation_to_bounds
from l3paper.checkpoint import save_model
from l3paper.config import TrainConfig, add_flags, from_flags
from l3paper.data import (
    TokenizedCorpus,
    load_corpus,
    require_length,
    training_batch,
)
from l3paper.device import pick_device, precision
from l3paper.evaluation import evaluate, read_words, word_perplexity
from l3paper.files import cache_folder, require_writable
from l3paper.generate import generate
from l3paper.gpt import GPT
from l3paper.optim import MuonAdamW
from l3paper.records import environment, write_record

WARMUP = 0.02
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.5
"""Share of the steps, the last ones, in which it falls to zero."""


@dataclass(frozen=True)
class TrainedRun:
    model: GPT
    corpus: TokenizedCorpus
    record: dict


def train(config: TrainConfig, show_progress: bool = True) -> TrainedRun:
    """Run one training from the text to the record. Losses are in nats a token.

    Raises ValueError for data that cannot be used and a device that is not there, OSError for a text
    of words that cannot be read.
    """
    device = pick_device(config.device)
    corpus = load_corpus(config.data, config.vocab_size, config.data_bytes)
    require_length(corpus.train, config.sequence_len)
    words = read_words(Path(config.words)) if config.words else None
    torch.manual_seed(config.seed)
    model, costs = build_model(config, corpus)
    model.to(device)
    optimizer = model.setup_optimizer(table_lr=config.table_lr, router_lr=config.router_lr)
    schedule = LambdaLR(
        optimizer,
        lambda step: config.lr_scale * learning_rate_factor(step, config.num_iterations),
    )
    evaluations = [_evaluation(model, corpus, config, step=0)]
    losses, seconds = [], []
    with tqdm(total=config.num_iterations, disable=not show_progress, unit="step") as bar:
        for step in range(config.num_iterations):
            begin = time.perf_counter()
            losses.append(train_step(model, optimizer, corpus, config, step))
            schedule.step()
            seconds.append(time.perf_counter() - begin)
            last = step + 1 == config.num_iterations
            if last or (step + 1) % config.eval_every == 0:
                evaluations.append(_evaluation(model, corpus, config, step + 1, everything=last))
            _show(bar, config, losses, seconds, evaluations)
    record = {
        "config": asdict(config) | {"data": corpus.name, "words": Path(config.words).name},
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "unigram_entropy": corpus.unigram_entropy(),
        },
        "environment": environment(device),
        "model": asdict(model.config) | costs.summary(),
        "train_loss": _thin(losses),
        "evaluations": evaluations,
        "tokens_per_second": config.batch_size * config.sequence_len / statistics.median(seconds),
        "seconds": sum(seconds),
        "sample": sample_text(model, corpus, new_tokens=64),
    }
    if words is not None:
        record["words"] = word_perplexity(model, corpus, words, config.batch_size)
        record["words"]["name"] = Path(config.words).name
    return TrainedRun(model, corpus, record)


def build_model(config: TrainConfig, corpus: TokenizedCorpus) -> tuple[GPT, Accounting]:
    """A fresh model, its L3 layers allocated from the training text, and its costs."""
    wanted = config.model_config()
    if not wanted.l3_blocks:
        return GPT(wanted), account(wanted)
    allocate = ALLOCATIONS[config.l3_allocation]
    alloc = allocate(corpus.documents(), corpus.vocab_size, wanted.l3_n_emb, wanted.l3_k_max)
    mean_rows = weighted_mean_rows(alloc, corpus.token_counts)
    if config.stand_in:
        model = GPT(STAND_INS[config.stand_in](wanted, mean_rows))
        return model, account(model.config)
    model = GPT(wanted)
    model.set_l3_bounds(allocation_to_bounds(alloc))
    return model, account(wanted, mean_rows)


def learning_rate_factor(step: int, steps: int) -> float:
    """The trapezoid: up over the first 2 % of the steps, level, down to zero over the last half."""
    rise = (step + 1) / max(1.0, WARMUP * steps)
    fall = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, rise, fall)


def train_step(
    model: GPT, optimizer: MuonAdamW, corpus: TokenizedCorpus, config: TrainConfig, step: int
) -> float:
    """One batch forward, backward, and into the weights; the loss before the update."""
    inputs, targets = training_batch(
        corpus.train, config.batch_size, config.sequence_len, config.seed, step
    )
    with precision(model):
        loss = model(inputs.to(model.device), targets.to(model.device))
        total = loss + model.auxiliary_loss()
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def sample_text(model: GPT, corpus: TokenizedCorpus, new_tokens: int) -> str:
    """The first eight held-out tokens and what the model makes of them, as its context permits."""
    prompt = corpus.validation[: min(8, model.config.sequence_len)].tolist()
    room = model.config.sequence_len - len(prompt)
    with precision(model):
        (ids,) = generate(model, [prompt], min(new_tokens, room), temperature=0.8)
    return corpus.tokenizer.decode(ids)


def _evaluation(model, corpus, config, step, everything=False) -> dict[str, float]:
    limit = None if everything else config.eval_tokens
    loss, bits = evaluate(model, corpus.validation, corpus.token_bytes, config.batch_size, limit)
    tokens = step * config.batch_size * config.sequence_len
    return {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "bits_per_byte": bits,
        "everything": everything,
    }


def _show(bar: tqdm, config: TrainConfig, losses, seconds, evaluations) -> None:
    rate = config.batch_size * config.sequence_len / statistics.median(seconds[-20:])
    bar.set_postfix_str(
        f"loss {losses[-1]:.3f}, held out {evaluations[-1]['loss']:.3f} "
        f"= {evaluations[-1]['bits_per_byte']:.3f} bits/byte, {rate:,.0f} tokens/s",
        refresh=False,
    )
    bar.update()


def _thin(losses: list[float], points: int = 100) -> list[dict[str, float]]:
    """The training loss as means over at most `points` equal stretches."""
    stretch = math.ceil(len(losses) / points)
    return [
        {"step": min(i + stretch, len(losses)), "loss": statistics.fmean(losses[i : i + stretch])}
        for i in range(0, len(losses), stretch)
    ]


PROGRAM = "python -m l3paper.train"


def command_line() -> argparse.ArgumentParser:
    """The parser; ValueError where $L3_PRESET names no preset."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [--preset NAME] [--record FILE] [--save DIR] [options]",
        description="Train a GPT with L3 layers (or, with --l3-after-layers '', without) and print "
        "its loss on held-out text. Without a flag: four blocks and one L3 layer on the source of "
        "Python's standard library, a few minutes on a laptop.",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write the run's JSON record here (default: runs/ in the cache folder)",
    )
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="write the trained model here, for l3paper.generate"
    )
    add_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    try:
        given = command_line().parse_args(arguments)
        config = from_flags(given)
        name = f"{config.kind}-depth{config.depth}-seed{config.seed}.json"
        path = given.record or cache_folder() / "runs" / name
        require_writable(path)
        if given.save:
            require_writable(given.save / "config.json")
        run = train(config)
        write_record(path, run.record)
        if given.save:
            save_model(given.save, run.model, run.corpus.tokenizer)
    except (ValueError, ImportError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    print(report(run.record))
    print(f"record: {path}")
    if given.save:
        print(f"model: {given.save}")
    return 0


def report(record: dict) -> str:
    """The end of a run in a few lines."""
    corpus, model, last = record["corpus"], record["model"], record["evaluations"][-1]
    return (
        f"text sample: {record['sample']!r}\n"
        f"unigram entropy of the training text: {corpus['unigram_entropy']:.3f} nats/token\n"
        f"loss on all {corpus['validation_tokens']:,} held-out tokens: {last['loss']:.3f} nats/token"
        f" = {last['bits_per_byte']:.3f} bits/byte\n"
        f"parameters: {model['total_parameters']:,}, active {model['active_parameters']:,.0f}; "
        f"{record['tokens_per_second']:,.0f} tokens/s over {record['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
