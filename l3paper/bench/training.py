"""How fast models train, side by side, and where the time of a step goes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from l3paper.bench.timing import interleaved_medians, peak_bytes, product_speed, profiler
from l3paper.costs.accounting import Accounting
from l3paper.data.streams import load_corpus, training_batch
from l3paper.experiments.catalogue import DENSE, EXPERIMENTS, spread, without_and_with
from l3paper.gpt import GPT
from l3paper.layer import rms_norm
from l3paper.parts.device import precision
from l3paper.parts.optimizer import MuonAdamW
from l3paper.training.build import build_model
from l3paper.training.config import PRESETS, TrainConfig
from l3paper.training.distributed import limit_gradients

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


@dataclass(frozen=True)
class Step:
    """A training step whose parts can be timed separately."""

    config: TrainConfig
    model: GPT
    costs: Accounting
    optimizer: MuonAdamW
    batch: tuple[Tensor, Tensor]
    """Inputs and targets (b, T) of one pass, on the model's device."""

    def gradients(self) -> None:
        """Run all passes of the step, forward and backward, each on the same batch."""
        for _ in range(self.config.accumulate):
            with precision(self.model):
                loss = self.model(*self.batch) + self.model.auxiliary_loss()
            loss.backward()

    def update(self) -> None:
        limit_gradients(self.model, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> None:
        self.gradients()
        self.update()


def make_step(config: TrainConfig, device: torch.device) -> Step:
    """Build the configuration's model, and cut one pass from its first batch."""
    corpus = load_corpus(config.data, config.vocab_size, config.data_bytes)
    model, costs = build_model(config, corpus)
    model.to(device)
    if config.compile:
        model.compile_parts()
    rows = config.batch_size // config.accumulate
    batch = training_batch(corpus.train, rows, config.sequence_len, seed=0, step=0)
    inputs, targets = (part.to(device) for part in batch)
    return Step(config, model, costs, model.setup_optimizer(), (inputs, targets))


def bench_train_step(
    preset: str, experiment: str | None, repeats: int, device: torch.device
) -> list[dict]:
    """Time a training step of a preset's models, without L3 and with it, or of an experiment's."""
    configs = without_and_with(PRESETS[preset])
    if experiment:
        configs = EXPERIMENTS[experiment].configs(preset, "stdlib")
    steps = {name: make_step(config, device) for name, config in configs.items()}
    return _rows(steps, interleaved_medians(_jobs(steps), repeats))


def _jobs(steps: dict[str, Step]) -> dict[str, Callable[[], None]]:
    jobs = {}
    for name, step in steps.items():
        jobs |= {f"{name}: passes": step.gradients, f"{name}: update": step.update}
    return jobs


def _rows(steps: dict[str, Step], medians: dict[str, float]) -> list[dict]:
    """One row per step, from the median seconds of its jobs. The first step is the dense model's."""
    rows = []
    for name, step in steps.items():
        update = medians[f"{name}: update"]
        seconds = medians[f"{name}: passes"] + update
        speed = step.config.batch_size * step.config.sequence_len / seconds
        row = {"model": name, "seconds": seconds, "tokens_per_second": speed}
        rows.append(row | {"optimizer_share": update / seconds})
    dense = rows[0]["tokens_per_second"]
    return [row | {"speed_of_dense": row["tokens_per_second"] / dense} for row in rows]


def bench_throughput(size: str, repeats: int, device: torch.device) -> list[dict]:
    """Time and profile a training step without, with one, and with two L3 layers at equal depth.

    "utilisation" is the speed of the step's operations, counted by the accounting, divided by that of
    one large product in the type that the model computes in. The shares of lookups (with the copies of
    their tables and the plan) and of projections are of all L3 layers; one layer is timed by itself.
    """
    base = SIZES[size]
    steps = {"dense": make_step(replace(base, **DENSE), device)}
    for layers, name in enumerate(("L3", "L3, two layers"), start=1):
        steps[name] = make_step(replace(base, l3_after_layers=spread(base, layers)), device)
    medians = interleaved_medians(_jobs(steps) | layer_jobs(steps["L3"]), repeats)
    rows = _rows(steps, medians)
    ceiling = product_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for row, step in zip(rows, steps.values(), strict=True):
        layers = len(step.model.l3_layers)
        plan = medians["plan"] if layers else 0.0  # all layers share it
        passes_per_second = base.accumulate / row["seconds"]
        row |= {
            "active_parameters": step.costs.active_parameters,
            "total_parameters": step.costs.total_parameters,
            "mean_rows": step.costs.mean_rows,
            "utilisation": step.costs.flops_training * row["tokens_per_second"] / ceiling,
            "lookup_share": passes_per_second * (plan + layers * medians["lookup"]),
            "projections_share": passes_per_second * layers * medians["projections"],
            "peak_bytes": peak_bytes(step.whole, device),
            "profile": longest_operations(step.whole, device),
        }
    return rows


def layer_jobs(step: Step) -> dict[str, Callable[[], None]]:
    """The plan of one pass, and lookup and projections of the first L3 layer, forward and backward.

    The lookup copies the tables as autocast wants them, and adds their gradients to earlier ones.
    """
    model, ids = step.model, step.batch[0]
    layer = next(iter(model.l3_layers.values()))
    dtype = torch.bfloat16 if ids.is_cuda else layer.w_mix.weight.dtype
    like = dict(device=ids.device, dtype=dtype, requires_grad=True)
    query = torch.randn(ids.numel(), layer.n_embd, **like)
    found = torch.randn(ids.numel(), layer.d_emb, **like)
    tables = list(dict.fromkeys(layer.tables()))  # one if tied
    sums = [torch.zeros_like(table) for table in tables]
    weights = [layer.w_up.weight, layer.w_mix.weight]
    plan = layer.plan(ids)

    def lookup() -> None:
        with precision(model):
            output = layer.look_up(query, ids.flatten(), plan)
        _, *gradients = torch.autograd.grad(output, [query, *tables], found.detach())
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient

    def mix(found: Tensor, query: Tensor) -> Tensor:
        return layer.w_mix(torch.cat([rms_norm(layer.w_up(found)), query], dim=-1))

    if step.config.compile:
        mix = torch.compile(mix, dynamic=False)

    def projections() -> None:
        with precision(model):
            output = mix(found, query)
        torch.autograd.grad(output, [query, found, *weights], torch.ones_like(output))

    return {"plan": lambda: layer.plan(ids), "lookup": lookup, "projections": projections}


def longest_operations(job: Callable[[], None], device: torch.device) -> list[dict]:
    """The operations of a warm job that take longest by themselves: calls, and share of the time.

    On CUDA, they are the kernels, and the shares are of the kernels' total time.
    """
    job()
    cuda = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watch:
        job()
        if cuda:
            torch.cuda.synchronize()
    events = watch.key_averages()
    if cuda:
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    taken = [(getattr(event, kind), event.count, event.key) for event in events]
    total = sum(time for time, _, _ in taken)
    return [
        {"operation": name[:100], "calls": calls, "share": time / total if total else 0.0}
        for time, calls, name in sorted(taken, reverse=True)[:PROFILED]
    ]
