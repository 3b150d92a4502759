"""Train a GPT, dense or with L3 layers: `python -m l3paper.train --help`."""

import argparse
import math
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from l3paper.checkpoints.model import require_place, save_model
from l3paper.checkpoints.run import Checkpoints, Progress, RunFolder, run_folder
from l3paper.costs.accounting import Accounting, exchanged_bytes
from l3paper.data.streams import (
    TokenizedCorpus,
    corpus_name,
    load_corpus,
    require_length,
)
from l3paper.files import cache_folder, require_writable
from l3paper.generate import generate
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.records import environment, write_record
from l3paper.training.build import build_model, compile_model
from l3paper.training.config import TrainConfig, add_flags, from_flags
from l3paper.training.distributed import joined, parallel, speaks, whole
from l3paper.training.evaluation import read_words, word_perplexity
from l3paper.training.signals import Interrupted, raised_signals
from l3paper.training.steps import Diverged, Training, tokens_a_step, train_on


@dataclass(frozen=True)
class TrainedRun:
    model: GPT
    corpus: TokenizedCorpus
    record: dict


def train(
    config: TrainConfig, show_progress: bool = True, checkpoints: Checkpoints | None = None
) -> TrainedRun:
    """Run one training from the text to the record. Losses are in nats a token.

    With `checkpoints`, the run can be interrupted: SIGINT and SIGTERM write one more and raise
    Interrupted, and what goes on later ends with the same weights and losses as an undisturbed run.

    Of the processes that torchrun starts, the first returns the whole model and the whole record.

    Raises ValueError for data and checkpoints that cannot be used and a device that is not there,
    OSError for a text of words that cannot be read, Diverged where a step's loss or gradients are not
    finite: it carries the record so far, and `checkpoints` keep the state before that step.
    """
    lock = run_folder(checkpoints) if checkpoints and speaks() else nullcontext()
    with lock, joined(config.device) as (group, device):
        parts = group.size * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size is {config.batch_size}; accumulate = {config.accumulate} passes of "
                f"{group.size} processes must divide it evenly"
            )
        corpus = load_corpus(config.data, config.vocab_size, config.data_bytes)
        require_length(corpus.train, config.sequence_len)
        words = read_words(Path(config.words)) if config.words else None
        torch.manual_seed(config.seed)
        model, costs = build_model(config, corpus)
        model.to(device)
        if config.compile:
            compile_model(model)
        forward = parallel(model, group, config.shard)
        optimizer = model.setup_optimizer(table_lr=config.table_lr, router_lr=config.router_lr)
        folder = RunFolder(checkpoints, _identity(config, corpus)) if checkpoints else None
        progress = folder.restore(model, optimizer) if folder else Progress()
        group.require_equal("step of the newest checkpoint", progress.step, device)
        record = _description(config, corpus, model, costs)
        run = Training(config, corpus, model, forward, optimizer, progress, folder, group)
        try:
            train_on(run, show_progress and speaks())
        except Diverged as error:
            record["diverged"] = str(error)
            error.record = record | _measured(config, progress)
            raise
        record |= _measured(config, progress)
        if group.size > 1:
            record["processes"] = _exchange(run)
            state = whole(model.state_dict(), speaks())
            if not speaks():
                return TrainedRun(model, corpus, record)
            model = GPT(model.config).to(device)
            model.load_state_dict(state)
    record["sample"] = sample_text(model, corpus, new_tokens=64)
    if words is not None:
        record["words"] = word_perplexity(model, corpus, words, config.batch_size)
        record["words"]["name"] = Path(config.words).name
    return TrainedRun(model, corpus, record)


def _description(config: TrainConfig, corpus: TokenizedCorpus, model: GPT, costs: Accounting) -> dict:
    """What a record says before the first step."""
    return {
        "config": asdict(config) | {"data": corpus.name, "words": Path(config.words).name},
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "unigram_entropy": corpus.unigram_entropy(),
        },
        "environment": environment(model.device),
        "model": asdict(model.config) | costs.summary(),
    }


def _measured(config: TrainConfig, progress: Progress) -> dict:
    """What it says after the last."""
    return {
        "train_loss": _thin(progress.losses),
        "evaluations": progress.evaluations,
        "tokens_per_second": tokens_a_step(config) / statistics.median(progress.seconds or [math.nan]),
        "seconds": sum(progress.seconds),
    }


def _exchange(run: Training) -> dict:
    """What a process sends in a step for the tables' gradients, beside a dense exchange, in bytes."""
    config, processes = run.config, run.group.size
    size = run.model.lm_head.weight.element_size()
    positions = tokens_a_step(config) // processes
    exchange = exchanged_bytes(run.model.config, positions, processes, size)
    sent = config.accumulate * exchange["dense"] if config.shard else exchange["positions"]
    return {
        "number": processes,
        "shard": config.shard,
        "table_bytes": sent,
        "dense_bytes": exchange["dense"],
    }


_PASSING = ("device", "words", "shard", "compile")
"""Settings in which two parts of a run may differ."""


def _identity(config: TrainConfig, corpus: TokenizedCorpus) -> dict:
    """What a checkpoint must share with the run that goes on from it."""
    settings = asdict(config) | {"data": corpus_name(config.data), "corpus": corpus.sha256}
    settings["tokenizer"] = corpus.tokenizer_sha256
    return {name: value for name, value in settings.items() if name not in _PASSING}


def sample_text(model: GPT, corpus: TokenizedCorpus, new_tokens: int) -> str:
    """The first eight held-out tokens and what the model makes of them, as its context permits."""
    prompt = corpus.validation[: min(8, model.config.sequence_len)].tolist()
    room = model.config.sequence_len - len(prompt)
    with precision(model):
        (ids,) = generate(model, [prompt], min(new_tokens, room), temperature=0.8)
    return corpus.tokenizer.decode(ids)


def _thin(losses: list[float], points: int = 100) -> list[dict[str, float]]:
    """The training loss as means over at most `points` equal stretches."""
    stretch = max(1, math.ceil(len(losses) / points))
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
    parser.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="leave checkpoints here to go on from"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="N",
        help="steps from one to the next (default: 100)",
    )
    parser.add_argument(
        "--checkpoint-keep", type=int, default=2, metavar="N", help="keep the N newest (default: 2)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint that is whole, if any"
    )
    add_flags(parser)
    return parser


def _checkpoints(given: argparse.Namespace) -> Checkpoints | None:
    if given.checkpoint_dir is None:
        if given.resume:
            raise ValueError("--resume needs --checkpoint-dir")
        return None
    require_writable(given.checkpoint_dir / "step")
    return Checkpoints(
        given.checkpoint_dir, given.checkpoint_every, given.checkpoint_keep, given.resume
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or one line on stderr and a code that is not 0.

    2 for input that cannot be used, 1 for a run that diverged, 128 + N for one that signal N stopped.
    """
    try:
        given = command_line().parse_args(arguments)
        with raised_signals():
            return _train_and_write(given)
    except (ValueError, ImportError, OSError) as error:
        return _fail(f"error: {error}", 2)
    except Diverged as error:
        return _fail(error, 1)
    except Interrupted as error:
        return _fail(error, error.code)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        left = "--resume goes on from the newest checkpoint, where --checkpoint-dir has one"
        return _fail(f"{signal.Signals(number).name}: {left}", 128 + number)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return _fail(f"error: it does not fit into memory: {str(error).splitlines()[0]}", 2)


def _train_and_write(given: argparse.Namespace) -> int:
    config = from_flags(given)
    name = f"{config.kind}-depth{config.depth}-seed{config.seed}.json"
    path = given.record or cache_folder() / "runs" / name
    require_writable(path)
    if given.save:
        require_place(given.save, [place for place in (path, given.checkpoint_dir) if place])
    run = train(config, checkpoints=_checkpoints(given))
    if not speaks():
        return 0
    write_record(path, run.record)
    if given.save:
        save_model(given.save, run.model, run.corpus.tokenizer)
    encoding = sys.stdout.encoding or "utf-8"  # a terminal that lacks a letter is no reason to fail
    print(report(run.record).encode(encoding, "backslashreplace").decode(encoding))
    print(f"record: {path}")
    if given.save:
        print(f"model: {given.save}")
    return 0


def _fail(why: object, code: int) -> int:
    print(f"{PROGRAM}: {' '.join(line.strip() for line in str(why).splitlines())}", file=sys.stderr)
    return code


def report(record: dict) -> str:
    """The end of a run in a few lines."""
    corpus, model, last = record["corpus"], record["model"], record["evaluations"][-1]
    lines = ""
    if processes := record.get("processes"):
        sent, dense = processes["table_bytes"], processes["dense_bytes"]
        lines = (
            f"{processes['number']} processes: each sent {sent:,.0f} bytes a step for the tables' "
            f"gradients, {sent / max(1, dense):.1%} of a dense exchange\n"
        )
    return lines + (
        f"text sample: {record['sample']!r}\n"
        f"unigram entropy of the training text: {corpus['unigram_entropy']:.3f} nats/token\n"
        f"loss on all {corpus['validation_tokens']:,} held-out tokens: {last['loss']:.3f} nats/token"
        f" = {last['bits_per_byte']:.3f} bits/byte\n"
        f"parameters: {model['total_parameters']:,}, active {model['active_parameters']:,.0f}; "
        f"{record['tokens_per_second']:,.0f} tokens/s over {record['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
