"""Train a GPT, dense or with L3 layers: `python -m l3paper.train --help`.

prepare -> for every step: batch, update, log, evaluate, save -> describe
"""

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from l3paper.checkpoints.model import require_place, save_model
from l3paper.checkpoints.run import Checkpoints, Progress, RunFolder, run_folder
from l3paper.checkpoints.start import Start, load_start, read_start, require_fit
from l3paper.costs.accounting import Accounting
from l3paper.data.batches import require_length
from l3paper.data.streams import TokenizedCorpus, load_corpus
from l3paper.errors import Failure, command, nonempty_path
from l3paper.files import cache_folder, require_writable
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.parts.optimizer import MuonAdamW
from l3paper.records import write_record
from l3paper.training import report
from l3paper.training.batches import Batches
from l3paper.training.build import build_model, compile_model
from l3paper.training.config import TrainConfig, add_flags, from_flags
from l3paper.training.distributed import (
    Group,
    exchange,
    is_rank_zero,
    joined,
    limit_gradients,
    parallel,
    unsharded,
)
from l3paper.training.evaluation import evaluate
from l3paper.training.signals import Interrupted, noted_signals

WARMUP = 0.02
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.5
"""Share of the steps, the last ones, in which it falls to zero."""


class Diverged(Failure):
    """A loss or a gradient was not finite.

    If it was the step's own, the weights are still those from before the step. If it was the loss on
    held-out text after the step, `loss` and `norm` are None. The documents are numbers in
    `TokenizedCorpus.documents()`; `record` is what the run had measured.
    """

    def __init__(self, step: int, loss: float | None, norm: float | None, documents: list[int]):
        super().__init__(step, loss, norm, documents)
        self.loss = loss
        self.record: dict = {}

    def __str__(self) -> str:
        step, loss, norm, documents = self.args
        its = f"its loss is {loss}, the norm of its gradients {norm}"
        if loss is None:
            its = "the held-out loss after it is not finite"
        numbers = ", ".join(map(str, documents))
        return f"step {step} diverged: {its}; the batch is from the training documents {numbers}"


@dataclass
class Training:
    """A run, as one process sees it."""

    config: TrainConfig
    corpus: TokenizedCorpus
    model: GPT
    forward: nn.Module
    """The model as it trains: its gradients are means over the processes."""
    optimizer: MuonAdamW
    progress: Progress = field(default_factory=Progress)
    folder: RunFolder | None = None
    group: Group = field(default_factory=Group)
    start: Start | None = None
    """The saved model that it starts from, if that is not random weights."""
    batches: Batches = field(init=False)

    def __post_init__(self):
        self.batches = Batches(self.config, self.corpus, self.group, self.model.device)


@dataclass(frozen=True)
class TrainedRun:
    model: GPT
    corpus: TokenizedCorpus
    record: dict


def train(
    config: TrainConfig,
    show_progress: bool = True,
    checkpoints: Checkpoints | None = None,
    before_step: Callable[[Training, int], None] | None = None,
) -> TrainedRun:
    """Run one training from the text to the record. Losses are in nats per token.

    With `checkpoints`, the run can be interrupted: a signal makes it write one more checkpoint and
    raise Interrupted, and a run that resumes ends with the same weights and losses as an undisturbed
    one. `before_step(run, step)`, if it is given, is called before every step.

    Of the processes that torchrun starts, the first returns the whole model and the whole record.

    Raises ValueError for data and checkpoints that cannot be used and a device that is not there,
    OSError for files that cannot be read or written, Diverged if a loss or a gradient is not finite: it
    carries the record so far. If they were a step's own, `checkpoints` keep the state before that step.
    """
    lock = run_folder(checkpoints) if checkpoints and is_rank_zero() else nullcontext()
    with lock, joined(config.device) as (group, device):
        run, costs = prepare(config, group, device, checkpoints)
        record = report.description(config, run.corpus, run.model, costs, run.start)
        if show_progress and is_rank_zero():
            print(report.introduction(run.config, run.corpus, run.model, costs), file=sys.stderr)
        try:
            train_on(run, show_progress and is_rank_zero(), before_step)
        except Diverged as error:
            _leave_diverged(run, error)
            error.record = record | {"diverged": str(error)} | report.measured(config, run.progress)
            raise
        record |= report.measured(config, run.progress)
        model = run.model
        if group.size > 1:
            record["processes"] = report.exchanged(config, model, group)
            state = unsharded(model.state_dict(), is_rank_zero())
            if not is_rank_zero():
                return TrainedRun(model, run.corpus, record)
            model = GPT(model.config).to(device)
            model.load_state_dict(state)
    record["sample"] = report.sample_text(model, run.corpus, new_tokens=64)
    return TrainedRun(model, run.corpus, record)


def prepare(
    config: TrainConfig, group: Group, device: torch.device, checkpoints: Checkpoints | None
) -> tuple[Training, Accounting]:
    """Text, model, optimizer and, where `checkpoints` say so, the state of the run that resumes.

    A run that resumes does not read the weights that it started from again.
    """
    parts = group.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}; accumulate = {config.accumulate} passes of "
            f"{group.size} processes must divide it evenly"
        )
    start = read_start(Path(config.init_from), config.vocab_size) if config.init_from else None
    tokenizer = start.tokenizer if start else None
    corpus = load_corpus(config.data, config.vocab_size, config.data_bytes, tokenizer=tokenizer)
    require_length(corpus.train, config.sequence_len, "training text")
    require_length(corpus.validation, config.sequence_len, "held-out text")
    torch.manual_seed(config.seed)
    model, costs, num_iterations = build_model(config, corpus)
    config = replace(config, num_iterations=num_iterations)
    identity = report.identity(config, corpus, start)
    folder = RunFolder(checkpoints, identity) if checkpoints else None
    if start:
        require_fit(start, model.config)
        if not (folder and folder.begun()):
            load_start(start, model)
    model.to(device)
    if config.compile:
        compile_model(model)
    forward = parallel(model, group, config.shard)
    optimizer = model.setup_optimizer(table_lr=config.table_lr, router_lr=config.router_lr)
    progress = folder.restore(model, optimizer) if folder else Progress()
    group.require_equal("step of the newest checkpoint", progress.step, device)
    return Training(config, corpus, model, forward, optimizer, progress, folder, group, start), costs


def train_on(
    run: Training,
    show_progress: bool,
    before_step: Callable[[Training, int], None] | None = None,
) -> None:
    """From the step the run has reached to the last: batch, update, log, evaluate, save.

    Raises Diverged if a loss or a gradient is not finite, Interrupted if a signal stops a run that
    leaves checkpoints, OSError if there is no room for those.
    """
    config, progress, folder = run.config, run.progress, run.folder
    schedule = learning_rate_schedule(run)
    if not progress.evaluations:
        progress.evaluations.append(evaluate_run(run, step=0))
    noted = noted_signals() if folder else nullcontext(lambda: None)
    with noted as signalled, progress_bar(run, show_progress) as bar:
        for step in range(progress.step, config.num_iterations):
            if before_step:
                before_step(run, step)
            begin = time.perf_counter()
            progress.losses.append(train_step(run, step))
            schedule.step()
            progress.seconds.append(time.perf_counter() - begin)

            last = step + 1 == config.num_iterations
            if last or (step + 1) % config.eval_every == 0:
                progress.evaluations.append(evaluate_run(run, step + 1))
                if last:
                    progress.evaluations.append(evaluate_run(run, step + 1, everything=True))
                if not math.isfinite(progress.evaluations[-1]["loss"]):
                    raise Diverged(step, None, None, run.batches.documents(step))
            show(bar, run)

            stop = folder is not None and run.group.any(signalled() is not None, run.model.device)
            if folder and (stop or last or (step + 1) % folder.settings.every == 0):
                save_checkpoint(run)
            if stop:
                raise Interrupted(signalled() or signal.SIGTERM, step + 1, folder.settings.folder)


def train_step(run: Training, step: int) -> float:
    """One batch forward, backward, and into the weights; the whole batch's loss before the update.

    The batch is divided into `accumulate` passes, whose gradients add up to those of their mean. The
    experts of an MoE balance their load in each pass by itself. Raises Diverged, and leaves the weights
    alone, if the loss or a gradient is not finite.
    """
    model, losses = run.model, []
    passes = run.batches.take(step)
    for number, (inputs, targets) in enumerate(passes, start=1):
        with exchange(run.forward, number == len(passes)):
            with precision(model):
                loss = run.forward(inputs, targets)
                total = (loss + model.auxiliary_loss()) / len(passes)
            total.backward()
        losses.append(loss.detach())
    norm = limit_gradients(model, run.config.clip)
    loss = run.group.mean(torch.stack(losses).mean())
    loss, norm = torch.stack([loss, norm]).tolist()  # the only synchronisation, but for an MoE's
    if not math.isfinite(loss + norm):
        raise Diverged(step, loss, norm, run.batches.documents(step))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss


def learning_rate_factor(step: int, steps: int) -> float:
    """The trapezoid: up over the first 2 % of the steps, level, down to zero over the last half."""
    rise = (step + 1) / max(1.0, WARMUP * steps)
    fall = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, rise, fall)


def learning_rate_schedule(run: Training) -> LambdaLR:
    """The schedule of all learning rates, at the step that the run has reached."""
    for parameters in run.optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    scale, steps = run.config.lr_scale, run.config.num_iterations
    return LambdaLR(
        run.optimizer,
        lambda step: scale * learning_rate_factor(step, steps),
        last_epoch=run.progress.step - 1,
    )


def evaluate_run(run: Training, step: int, everything: bool = False) -> dict:
    """The losses on held-out text after `step` steps: on a sample of it, or on everything.

    On everything, the nats of every document are kept as well.
    """
    config, corpus = run.config, run.corpus
    limit = None if everything else config.eval_tokens
    held_out = evaluate(run.model, corpus.validation, config.batch_size, limit)
    measured = {
        "step": step,
        "tokens": step * config.tokens_per_step,
        "loss": held_out.loss,
        "bits_per_byte": held_out.bits_per_byte(corpus.token_bytes),
        "everything": everything,
    }
    if everything:
        tokens, nats = held_out.by_document()
        measured["documents"] = {"tokens": tokens.tolist(), "nats": nats.round(3).tolist()}
    return measured


def save_checkpoint(run: Training, prune: bool = True) -> None:
    """Write a checkpoint: all processes gather the state, and the first one writes it."""
    writes = run.group.rank == 0
    run.folder.save(run.model, run.optimizer, run.corpus.tokenizer, run.progress, writes, prune)


def _leave_diverged(run: Training, error: Diverged) -> None:
    """Keep the weights of before the step, and note that there is no loss to evaluate."""
    if error.loss is None:
        return
    if run.folder:
        save_checkpoint(run, prune=False)  # these weights may be what the step diverged from
    step = run.progress.step
    lost = {"loss": math.nan, "bits_per_byte": math.nan, "everything": True}
    run.progress.evaluations.append({"step": step, "tokens": step * run.config.tokens_per_step} | lost)


def progress_bar(run: Training, shown: bool) -> tqdm:
    """A bar of at most 80 columns, whose end `show` fills in."""
    return tqdm(
        initial=run.progress.step,
        total=run.config.num_iterations,
        disable=not shown,
        bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )


def show(bar: tqdm, run: Training) -> None:
    """One step more: the training loss, the last evaluation, and the speed."""
    speed = run.config.tokens_per_step / statistics.median(run.progress.seconds[-20:])
    held_out = run.progress.evaluations[-1]
    bar.set_postfix_str(
        f"loss {run.progress.losses[-1]:.3f}, held out {held_out['loss']:.3f} "
        f"({held_out['bits_per_byte']:.3f} bits/byte), {speed / 1e3:.1f}k tok/s",
        refresh=False,
    )
    bar.update()


def command_line() -> argparse.ArgumentParser:
    """The parser; ValueError if $L3_PRESET names an unknown preset."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.train",
        usage="%(prog)s [--preset NAME] [--record FILE] [--save DIR] [options]",
        description="Train a GPT with L3 layers (or, with --l3-after-layers '', without) and print "
        "its loss on held-out text. Without a flag: four blocks and one L3 layer on the source of "
        "Python's standard library, a few minutes on a laptop.",
    )
    add = parser.add_argument
    for flag, metavar, what in (
        ("--record", "FILE", "the JSON record (default: in the cache folder)"),
        ("--save", "DIR", "write the trained model here, for l3paper.generate"),
        ("--checkpoint-dir", "DIR", "leave checkpoints here to resume from"),
    ):
        add(flag, type=nonempty_path, metavar=metavar, help=what)
    add("--checkpoint-every", type=int, default=100, metavar="N", help="steps apart (default: 100)")
    add("--checkpoint-keep", type=int, default=2, metavar="N", help="keep the N newest (default: 2)")
    add("--resume", action="store_true", help="resume from the newest intact checkpoint, if any")
    add_flags(parser)
    return parser


@command("python -m l3paper.train")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: exit code 0, or one line on stderr and one of `l3paper.errors`."""
    given = command_line().parse_args(arguments)
    config = from_flags(given)
    name = f"{config.kind}-depth{config.depth}-seed{config.seed}.json"
    path = given.record or cache_folder() / "runs" / name
    require_writable(path)
    if given.save:
        require_place(given.save, [place for place in (path, given.checkpoint_dir) if place])
    if given.resume and given.checkpoint_dir is None:
        raise ValueError("--resume needs --checkpoint-dir")
    checkpoints = None
    if given.checkpoint_dir:
        require_writable(given.checkpoint_dir / "step")
        checkpoints = Checkpoints(
            given.checkpoint_dir, given.checkpoint_every, given.checkpoint_keep, given.resume
        )
    try:
        run = train(config, checkpoints=checkpoints)
    except Diverged as error:
        if is_rank_zero():
            write_record(path, error.record)
        raise
    if not is_rank_zero():
        return 0
    try:
        if given.save:
            save_model(given.save, run.model, run.corpus.tokenizer)
    finally:
        write_record(path, run.record)
    print(report.report(run.record))
    print(f"record: {path}")
    if given.save:
        print(f"model: {given.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
