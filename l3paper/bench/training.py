"""How fast models train, side by side, and where the time of a step goes."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from l3paper.bench.timing import interleaved_medians, peak_bytes, product_speed
from l3paper.costs.accounting import Accounting
from l3paper.data.streams import load_corpus
from l3paper.experiments.catalogue import DENSE, EXPERIMENTS, spread, without_and_with
from l3paper.parts.device import precision
from l3paper.train import Training, train_step
from l3paper.training.build import build_model
from l3paper.training.config import PRESETS, TrainConfig

_PAPER = TrainConfig(
    vocab_size=32768, sequence_len=1024, batch_size=256, l3_n_emb=710_000, l3_k_max=512, compile=True
)
SIZES = {
    "smoke": TrainConfig(
        vocab_size=512, depth=2, n_embd=32, sequence_len=64, batch_size=8, accumulate=2, l3_n_emb=1024
    ),
    "100M": replace(_PAPER, depth=8, n_embd=768, n_head=6, accumulate=4),
    "400M": replace(_PAPER, depth=26, n_embd=1024, n_head=8, accumulate=16),
}
"""Models by their active parameters, with the paper's number of rows and its cap."""

PROFILED = 12
"""The number of operations that a profile names, the longest first."""


class Run(NamedTuple):
    """A training run that repeats its first step, and the costs of its model."""

    training: Training
    costs: Accounting

    def step(self) -> None:
        train_step(self.training, step=0)

    def jobs(self) -> dict[str, Callable[[], None]]:
        """The whole step, and the optimizer's part of it, to be timed in turn."""
        optimizer = self.training.optimizer
        zeros = [(weight, torch.zeros_like(weight)) for weight in self.training.model.parameters()]

        def update() -> None:
            for weight, zero in zeros:
                weight.grad = zero
            optimizer.step()
            optimizer.zero_grad()

        return {"step": self.step, "update": update}


def make_run(config: TrainConfig, device: torch.device) -> Run:
    """Build the configuration's model, ready to train on the device."""
    corpus = load_corpus(config.data, config.vocab_size, config.data_bytes)
    model, costs, _ = build_model(config, corpus)
    model.to(device)
    if config.compile:
        model.compile_parts()
    optimizer = model.setup_optimizer()
    for parameters in optimizer.param_groups:
        parameters["lr"] = 0.0  # the weights stay, so that every round does the same
    return Run(Training(config, corpus, model, model, optimizer), costs)


def bench_train_step(
    preset: str, experiment: str | None, repeats: int, device: torch.device
) -> list[dict]:
    """Time a training step of a preset's models, without L3 and with it, or of an experiment's."""
    configs = without_and_with(PRESETS[preset])
    if experiment:
        configs = EXPERIMENTS[experiment].configs(preset, "stdlib")
    runs = {name: make_run(config, device) for name, config in configs.items()}
    return _rows(runs, interleaved_medians(_jobs(runs), repeats))


def _jobs(runs: dict[str, Run]) -> dict[str, Callable[[], None]]:
    return {f"{name}: {what}": job for name, run in runs.items() for what, job in run.jobs().items()}


def _rows(runs: dict[str, Run], medians: dict[str, float]) -> list[dict]:
    """One row per run, from its median seconds; without "dense", the first takes its part."""
    dense = medians["dense: step" if "dense" in runs else f"{next(iter(runs))}: step"]
    return [
        {
            "model": name,
            "seconds": (seconds := medians[f"{name}: step"]),
            "tokens_per_second": run.training.config.tokens_per_step / seconds,
            "optimizer_share": medians[f"{name}: update"] / seconds,
            "speed_of_dense": dense / seconds,
        }
        for name, run in runs.items()
    ]


def bench_throughput(size: str, repeats: int, device: torch.device) -> list[dict]:
    """Time and profile a training step without, with one, and with two L3 layers at equal depth.

    "utilisation" is the speed of the step's operations, counted by the accounting, divided by that of
    one large product in the type that the model computes in. The shares of lookups (with the copies of
    their tables and the plan) and of projections (with the rest of the layer) are of all L3 layers; one
    layer is timed by itself.
    """
    base = SIZES[size]
    runs = {"dense": make_run(replace(base, **DENSE), device)}
    for layers, name in enumerate(("L3", "L3, two layers"), start=1):
        runs[name] = make_run(replace(base, l3_after_layers=spread(base, layers)), device)
    medians = interleaved_medians(_jobs(runs) | layer_jobs(runs["L3"].training), repeats)
    rows = _rows(runs, medians)
    ceiling = product_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for row, run in zip(rows, runs.values(), strict=True):
        layers = len(run.training.model.l3_layers)
        plan = medians["plan"] if layers else 0.0  # all layers share it
        projections = medians["layer"] - medians["lookup"]
        passes_per_second = base.accumulate / row["seconds"]
        row |= {
            "active_parameters": run.costs.active_parameters,
            "total_parameters": run.costs.total_parameters,
            "mean_rows": run.costs.mean_rows,
            "utilisation": run.costs.flops_training * row["tokens_per_second"] / ceiling,
            "lookup_share": passes_per_second * (plan + layers * medians["lookup"]),
            "projections_share": passes_per_second * layers * projections,
            "peak_bytes": peak_bytes(run.step, device),
            "profile": longest_operations(run.step, device),
        }
    return rows


def layer_jobs(run: Training) -> dict[str, Callable[[], None]]:
    """The plan of one pass, and the first L3 layer and its lookup, forward and backward.

    As in training, the tables are copied in autocast's type, and gradients are added to earlier ones.
    """
    model = run.model
    ids, _ = run.batches.take(step=0)[0]  # (b, T)
    layer = next(iter(model.l3_layers.values()))
    dtype = torch.bfloat16 if ids.is_cuda else layer.w_mix.weight.dtype
    x = torch.randn(*ids.shape, layer.n_embd, device=ids.device, dtype=dtype, requires_grad=True)
    plan = layer.plan(ids)

    def job(compute: Callable, parameters: list[Tensor]) -> Callable[[], None]:
        sums = [torch.zeros_like(parameter) for parameter in parameters]

        def forward_and_backward() -> None:
            with precision(model):
                output = compute(x, ids, plan)
            _, *gradients = torch.autograd.grad(output, [x, *parameters], torch.ones_like(output))
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient

        return forward_and_backward

    tables = list(dict.fromkeys(layer.tables()))  # one if tied
    return {
        "plan": lambda: layer.plan(ids),
        "lookup": job(layer.look_up, tables),
        "layer": job(layer, list(layer.parameters())),
    }


def longest_operations(job: Callable[[], None], device: torch.device) -> list[dict]:
    """The operations of a warm job that take longest by themselves: calls, and share of the time.

    On CUDA, they are the kernels, and the shares are of the kernels' total time.
    """
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would log each start on stderr
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watch:
        job()
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    seconds = "self_device_time_total" if cuda else "self_cpu_time_total"
    taken = [
        (getattr(event, seconds), event.count, event.key)
        for event in watch.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    total = sum(time for time, _, _ in taken)
    return [
        {"operation": name[:100], "calls": calls, "share": time / total if total else 0.0}
        for time, calls, name in sorted(taken, reverse=True)[:PROFILED]
    ]
