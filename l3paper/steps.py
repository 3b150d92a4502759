"""The steps of a training run: schedule, update, evaluations, checkpoints, and where to stop."""

import math
import statistics
import time
from contextlib import nullcontext

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from l3paper.config import TrainConfig
from l3paper.data import TokenizedCorpus, batch_starts, documents_at, training_batch
from l3paper.device import precision
from l3paper.evaluation import evaluate
from l3paper.gpt import GPT
from l3paper.optim import MuonAdamW
from l3paper.resume import Interrupted, Progress, RunFolder, noted_signals

WARMUP = 0.02
"""Share of the steps in which the learning rate rises to its peak."""

DECAY = 0.5
"""Share of the steps, the last ones, in which it falls to zero."""


class Diverged(ArithmeticError):
    """A loss or a gradient was not finite; the weights are those of before the step."""

    def __init__(self, step: int, loss: float, norm: float, documents: list[int]):
        self.record: dict = {}
        super().__init__(
            f"step {step} diverged: its loss is {loss}, the norm of its gradients {norm}; "
            f"the batch is from the training documents {', '.join(map(str, documents))}"
        )


def train_on(
    config: TrainConfig,
    model: GPT,
    optimizer: MuonAdamW,
    corpus: TokenizedCorpus,
    progress: Progress,
    folder: RunFolder | None,
    show_progress: bool,
) -> None:
    """From where `progress` stands to the last step, noting losses and times there."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule = LambdaLR(
        optimizer,
        lambda step: config.lr_scale * learning_rate_factor(step, config.num_iterations),
        last_epoch=progress.step - 1,
    )
    if not progress.evaluations:
        progress.evaluations.append(_evaluation(model, corpus, config, step=0))

    def save() -> None:
        folder.save(model, optimizer, corpus.tokenizer, progress)

    steps = range(progress.step, config.num_iterations)
    bar = tqdm(
        initial=progress.step, total=config.num_iterations, disable=not show_progress, unit="step"
    )
    with bar, noted_signals() if folder else nullcontext(lambda: None) as stop:
        for step in steps:
            begin = time.perf_counter()
            try:
                progress.losses.append(train_step(model, optimizer, corpus, config, step))
            except Diverged:
                if folder:
                    save()
                lost = {"loss": math.nan, "bits_per_byte": math.nan, "everything": True}
                progress.evaluations.append(
                    {"step": step, "tokens": step * tokens_a_step(config)} | lost
                )
                raise
            schedule.step()
            progress.seconds.append(time.perf_counter() - begin)
            last = step + 1 == config.num_iterations
            if last or (step + 1) % config.eval_every == 0:
                evaluation = _evaluation(model, corpus, config, step + 1, everything=last)
                progress.evaluations.append(evaluation)
            _show(bar, config, progress)
            if folder and (stop() or last or (step + 1) % folder.settings.every == 0):
                save()
            if stop():
                raise Interrupted(stop(), step + 1, folder.settings.folder)


def learning_rate_factor(step: int, steps: int) -> float:
    """The trapezoid: up over the first 2 % of the steps, level, down to zero over the last half."""
    rise = (step + 1) / max(1.0, WARMUP * steps)
    fall = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, rise, fall)


def train_step(
    model: GPT, optimizer: MuonAdamW, corpus: TokenizedCorpus, config: TrainConfig, step: int
) -> float:
    """One batch forward, backward, and into the weights; the loss before the update.

    Raises Diverged, and leaves the weights alone, where the loss or a gradient is not finite.
    """
    which = config.batch_size, config.sequence_len, config.seed, 0 if config.overfit_batch else step
    inputs, targets = training_batch(corpus.train, *which)
    with precision(model):
        loss = model(inputs.to(model.device), targets.to(model.device))
        total = loss + model.auxiliary_loss()
    total.backward()
    if config.clip:
        norm = clip_grad_norm_(model.parameters(), config.clip)
    else:
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    loss, norm = torch.stack([loss.detach(), norm]).tolist()  # the step's one wait for the device
    if not math.isfinite(loss + norm):
        starts = batch_starts(corpus.train, *which)
        raise Diverged(step, loss, norm, documents_at(corpus.train, starts, config.sequence_len + 1))
    optimizer.step()
    optimizer.zero_grad()
    return loss


def tokens_a_step(config: TrainConfig) -> int:
    """In the whole batch."""
    return config.batch_size * config.sequence_len


def _evaluation(model, corpus, config, step, everything=False) -> dict[str, float]:
    limit = None if everything else config.eval_tokens
    loss, bits = evaluate(model, corpus.validation, corpus.token_bytes, config.batch_size, limit)
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
