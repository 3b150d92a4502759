"""What a run says of itself: at its start, in its record, and at its end."""

import math
import statistics
from dataclasses import asdict

from l3paper.checkpoints.run import Progress
from l3paper.checkpoints.start import Start
from l3paper.costs.accounting import Accounting, exchanged_bytes
from l3paper.data.sources import corpus_name
from l3paper.data.streams import TokenizedCorpus
from l3paper.generate import generate
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.records import environment
from l3paper.training.config import TrainConfig
from l3paper.training.distributed import Group

MAY_DIFFER = ("device", "shard", "compile")
"""Settings in which two parts of a run may differ."""


def identity(config: TrainConfig, corpus: TokenizedCorpus, start: Start | None) -> dict:
    """What a checkpoint must share with the run that resumes from it."""
    settings = asdict(config) | {"data": corpus_name(config.data), "corpus": corpus.sha256}
    settings["tokenizer"] = corpus.tokenizer_sha256
    del settings["init_from"]  # the folder may move, and runs from random weights have none
    if start:
        settings["init_from"] = start.sha256
    return {name: value for name, value in settings.items() if name not in MAY_DIFFER}


def introduction(config: TrainConfig, corpus: TokenizedCorpus, model: GPT, costs: Accounting) -> str:
    """Three lines: what is trained, on what, for how long."""
    c = model.config
    layers = f"L3 after block {c.l3_after_layers}, {c.l3_n_emb:,} rows" if c.l3_blocks else "no L3"
    layers += f", {c.rival} after block {c.rival_after_layers}" if c.rival else ""
    total, active = costs.total_parameters, costs.active_parameters
    train, held_out, vocab = len(corpus.train), len(corpus.validation), corpus.vocab_size
    steps, tokens = config.num_iterations, config.tokens_per_step
    start = f", starting from {config.init_from!r}" if config.init_from else ""
    return (
        f"model: {c.n_layer} blocks {c.n_embd} wide, {layers}; "
        f"parameters: {total:,}, active {active:,.0f}\n"
        f"text: {corpus.name}, {train:,} training tokens, {held_out:,} held out, vocabulary {vocab:,}\n"
        f"training: {steps:,} steps of {tokens:,} tokens on {model.device.type}{start}"
    )


def description(
    config: TrainConfig,
    corpus: TokenizedCorpus,
    model: GPT,
    costs: Accounting,
    start: Start | None,
) -> dict:
    """The part of the record that is known before the first step."""
    origin = {"init_from": {"name": start.name, "sha256": start.sha256}} if start else {}
    return origin | {
        "config": asdict(config) | {"data": corpus.name, "init_from": start and start.name},
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


def measured(config: TrainConfig, progress: Progress) -> dict:
    """The part of the record that the steps add."""
    return {
        "train_loss": thin(progress.losses),
        "evaluations": progress.evaluations,
        "tokens_per_second": config.tokens_per_step / statistics.median(progress.seconds or [math.nan]),
        "seconds": sum(progress.seconds),
    }


def exchanged(config: TrainConfig, model: GPT, group: Group) -> dict:
    """The bytes that a process sends per step for the tables' gradients, beside a dense exchange."""
    positions = config.tokens_per_step // group.size
    size = model.lm_head.weight.element_size()
    exchange = exchanged_bytes(model.config, positions, group.size, size)
    sent = config.accumulate * exchange["dense"] if config.shard else exchange["positions"]
    return {
        "number": group.size,
        "shard": config.shard,
        "table_bytes": sent,
        "dense_bytes": exchange["dense"],
    }


def sample_text(model: GPT, corpus: TokenizedCorpus, new_tokens: int) -> str:
    """The first eight held-out tokens and the model's continuation, as far as its context permits."""
    prompt = corpus.validation[: min(8, model.config.sequence_len)].tolist()
    room = model.config.sequence_len - len(prompt)
    with precision(model):
        (ids,) = generate(model, [prompt], min(new_tokens, room), temperature=0.8)
    return corpus.tokenizer.decode(ids)


def thin(losses: list[float], points: int = 100) -> list[dict[str, float]]:
    """The training loss as means over at most `points` stretches of equal length."""
    stretch = max(1, math.ceil(len(losses) / points))
    return [
        {"step": min(i + stretch, len(losses)), "loss": statistics.fmean(losses[i : i + stretch])}
        for i in range(0, len(losses), stretch)
    ]


def report(record: dict) -> str:
    """The end of a run in a few lines."""
    corpus, model, last = record["corpus"], record["model"], record["evaluations"][-1]
    shown = " ".join(record["sample"].split())
    lines = ""
    if processes := record.get("processes"):
        sent, dense = processes["table_bytes"], processes["dense_bytes"]
        lines = (
            f"{processes['number']} processes: each sent {sent:,.0f} bytes per step for the tables' "
            f"gradients, {sent / max(1, dense):.1%} of a dense exchange\n"
        )
    return lines + (
        f"text sample: {shown}\n"
        f"unigram entropy of the training text: {corpus['unigram_entropy']:.3f} nats/token\n"
        f"loss on all {corpus['validation_tokens']:,} held-out tokens: {last['loss']:.3f} nats/token"
        f" = {last['bits_per_byte']:.3f} bits/byte\n"
        f"parameters: {model['total_parameters']:,}, active {model['active_parameters']:,.0f}; "
        f"{record['tokens_per_second']:,.0f} tokens/s over {record['seconds']:.0f} s"
    )
