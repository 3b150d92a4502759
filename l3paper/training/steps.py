"""The steps of a training run: schedule, update, evaluations, checkpoints, and where to stop."""

import math
import signal
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from l3paper.checkpoints.run import Progress, RunFolder
from l3paper.data.batches import Batches
from l3paper.data.streams import TokenizedCorpus
from l3paper.gpt import GPT
from l3paper.parts.device import precision
from l3paper.parts.optimizer import MuonAdamW
from l3paper.training.config import TrainConfig
from l3paper.training.distributed import Group, exchange, limit_gradients
from l3paper.training.evaluation import evaluate
from l3paper.training.signals import Interrupted, noted_signals

WARMUP = 0.02
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.5
"""Share of the steps, the last ones, in which it falls to zero."""


class Diverged(ArithmeticError):
    """A loss or a gradient was not finite.

    Where it was the step's own, the weights are those of before the step; where it was not, `loss` and
    `norm` are None, and the loss on held-out text after the step was not finite. The documents are
    numbers in `TokenizedCorpus.documents()`; `record` is what the run had measured.
    """

    def __init__(self, step: int, loss: float | None, norm: float | None, documents: list[int]):
        super().__init__(step, loss, norm, documents)
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
    batches: Batches = field(init=False)

    def __post_init__(self):
        self.batches = Batches(self.config, self.corpus, self.group, self.model.device)


def train_on(run: Training, show_progress: bool) -> None:
    """From where the run stands to the last step, noting losses and times.

    Raises Diverged where a loss or a gradient is not finite, Interrupted where a signal stops a run
    that leaves checkpoints, OSError where there is no room for those.
    """
    config, progress, folder = run.config, run.progress, run.folder
    for parameters in run.optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    schedule = LambdaLR(
        run.optimizer,
        lambda step: config.lr_scale * learning_rate_factor(step, config.num_iterations),
        last_epoch=progress.step - 1,
    )
    if not progress.evaluations:
        progress.evaluations.append(_evaluation(run, step=0))

    def save(prune: bool = True) -> None:
        failure = None
        writes = run.group.rank == 0
        try:
            folder.save(run.model, run.optimizer, run.corpus.tokenizer, progress, writes, prune)
        except OSError as error:
            failure = error
        if run.group.any(failure is not None, run.model.device):
            raise failure or OSError("another process could not write a checkpoint")

    steps = range(progress.step, config.num_iterations)
    bar = tqdm(
        initial=progress.step, total=config.num_iterations, disable=not show_progress, unit="step"
    )
    with bar, noted_signals() if folder else nullcontext(lambda: None) as told:
        for step in steps:
            begin = time.perf_counter()
            try:
                progress.losses.append(train_step(run, step))
            except Diverged:
                if folder:
                    save(prune=False)  # these weights may be what the step diverged from
                lost = {"loss": math.nan, "bits_per_byte": math.nan, "everything": True}
                progress.evaluations.append(
                    {"step": step, "tokens": step * tokens_a_step(config)} | lost
                )
                raise
            schedule.step()
            progress.seconds.append(time.perf_counter() - begin)
            last = step + 1 == config.num_iterations
            if last or (step + 1) % config.eval_every == 0:
                progress.evaluations.append(_evaluation(run, step + 1, everything=last))
                if not math.isfinite(progress.evaluations[-1]["loss"]):
                    raise Diverged(step, None, None, run.batches.documents(step))
            _show(bar, config, progress)
            stop = folder is not None and run.group.any(told() is not None, run.model.device)
            if folder and (stop or last or (step + 1) % folder.settings.every == 0):
                save()
            if stop:
                raise Interrupted(told() or signal.SIGTERM, step + 1, folder.settings.folder)


def learning_rate_factor(step: int, steps: int) -> float:
    """The trapezoid: up over the first 2 % of the steps, level, down to zero over the last half."""
    rise = (step + 1) / max(1.0, WARMUP * steps)
    fall = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, rise, fall)


def train_step(run: Training, step: int) -> float:
    """One batch forward, backward, and into the weights; the whole batch's loss before the update.

    The batch goes through in `accumulate` passes, whose gradients add up to those of their mean. The
    experts of an MoE balance their load in each pass by itself. Raises Diverged, and leaves the weights
    alone, where the loss or a gradient is not finite.
    """
    model, losses = run.model, []
    passes = run.batches[step]
    for number, (inputs, targets) in enumerate(passes, start=1):
        with exchange(run.forward, number == len(passes)):
            with precision(model):
                loss = run.forward(inputs, targets)
                total = (loss + model.auxiliary_loss()) / len(passes)
            total.backward()
        losses.append(loss.detach())
    norm = limit_gradients(model, run.config.clip)
    loss = run.group.mean(torch.stack(losses).mean())
    loss, norm = torch.stack([loss, norm]).tolist()  # the step's one wait for the device, but an MoE's
    if not math.isfinite(loss + norm):
        raise Diverged(step, loss, norm, run.batches.documents(step))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss


def tokens_a_step(config: TrainConfig) -> int:
    """In the whole batch."""
    return config.batch_size * config.sequence_len


def _evaluation(run: Training, step: int, everything: bool = False) -> dict[str, float]:
    config, corpus = run.config, run.corpus
    limit = None if everything else config.eval_tokens
    loss, bits = evaluate(run.model, corpus.validation, corpus.token_bytes, config.batch_size, limit)
    return {
        "step": step,
        "tokens": step * tokens_a_step(config),
        "loss": loss,
        "bits_per_byte": bits,
        "everything": everything,
    }


def _show(bar: tqdm, config: TrainConfig, progress: Progress) -> None:
    rate = tokens_a_step(config) / statistics.median(progress.seconds[-20:])
    evaluation = progress.evaluations[-1]
    bar.set_postfix_str(
        f"loss {progress.losses[-1]:.3f}, held out {evaluation['loss']:.3f} "
        f"= {evaluation['bits_per_byte']:.3f} bits/byte, {rate:,.0f} tokens/s",
        refresh=False,
    )
    bar.update()
