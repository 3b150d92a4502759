"""How fast models train, side by side, and where the time of a step goes."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from l3paper.bench.timing import interleaved_medians, peak_bytes, product_speed
from l3paper.costs.accounting import Accounting
from l3paper.data.streams import TokenizedCorpus, load_corpus, training_batch
from l3paper.experiments.catalogue import DENSE, spread
from l3paper.gpt import GPT
from l3paper.layer import rms_norm
from l3paper.parts.device import precision
from l3paper.parts.optimizer import MuonAdamW
from l3paper.training.build import build_model
from l3paper.training.config import TrainConfig
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
"""Operations that a profile names, the longest first."""


@dataclass(frozen=True)
class Step:
    """A step of training in its parts, to be timed apart."""

    config: TrainConfig
    model: GPT
    costs: Accounting
    optimizer: MuonAdamW
    batch: tuple[Tensor, Tensor]
    """Inputs and targets (b, T) of one pass, on the model's device."""

    def gradients(self) -> None:
        """One pass. The first of a step makes the gradients, the others add to them."""
        with precision(self.model):
            loss = self.model(*self.batch) + self.model.auxiliary_loss()
        loss.backward()

    def update(self) -> None:
        limit_gradients(self.model, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> None:
        for _ in range(self.config.accumulate):
            self.gradients()
        self.update()

    def jobs(self, name: str) -> dict[str, Callable[[], None]]:
        """To be run in this order, again and again."""
        jobs = {f"{name}: first pass": self.gradients, f"{name}: next pass": self.gradients}
        return jobs | {f"{name}: update": self.update}

    def costs_of(self, name: str, medians: dict[str, float]) -> dict[str, float]:
        """From the medians of its jobs: seconds a step, tokens a second, the optimizer's share."""
        first, following, update = (medians[job] for job in self.jobs(name))
        seconds = first + (self.config.accumulate - 1) * following + update
        tokens = self.config.batch_size * self.config.sequence_len
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "optimizer_share": update / seconds,
        }


def make_step(config: TrainConfig, corpus: TokenizedCorpus, device: torch.device) -> Step:
    """The configuration's model, and one pass of its first batch."""
    model, costs = build_model(config, corpus)
    model.to(device)
    if config.compile:
        model.compile_parts()
    passing = config.batch_size // config.accumulate
    batch = training_batch(corpus.train, passing, config.sequence_len, seed=0, step=0)
    on_device = tuple(part.to(device) for part in batch)
    return Step(config, model, costs, model.setup_optimizer(), on_device)


def bench_train_step(configs: dict[str, TrainConfig], repeats: int, device: torch.device) -> list[dict]:
    """A training step of every model, the first of which is dense, and the optimizer's share of it."""
    steps, corpora = {}, {}
    for name, config in configs.items():
        key = config.vocab_size, config.data_bytes
        corpora[key] = corpora.get(key) or load_corpus(config.data, *key)
        steps[name] = make_step(config, corpora[key], device)
    return _side_by_side(steps, {}, repeats)[0]


def _side_by_side(
    steps: dict[str, Step], more: dict[str, Callable[[], None]], repeats: int
) -> tuple[list[dict], dict[str, float]]:
    """A row a step, its speed held to the first's; and the medians of all jobs, `more` among them."""
    jobs = {job: run for name, step in steps.items() for job, run in step.jobs(name).items()} | more
    medians = interleaved_medians(jobs, repeats)
    rows = [{"model": name} | step.costs_of(name, medians) for name, step in steps.items()]
    first = rows[0]["tokens_per_second"]
    return [row | {"speed_of_dense": row["tokens_per_second"] / first} for row in rows], medians


def bench_throughput(size: str, repeats: int, device: torch.device) -> tuple[list[dict], dict]:
    """Dense against one and two L3 layers at equal depth, a pair at a time; and a profile of each.

    "utilisation" is the share of the speed of one large product, in the type that the model computes
    in, that the step's operations reach, by the accounting. The shares of lookups, with their tables'
    copies and the plan, and of projections are of all L3 layers, timed by themselves on the same ids.
    """
    base = SIZES[size]
    corpus = load_corpus(base.data, base.vocab_size)
    ceiling = product_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    dense = make_step(replace(base, **DENSE), corpus, device)
    results, profiles = [], {"dense": profiled(dense.whole, device)}
    for layers, name in enumerate(("L3", "L3, two layers"), start=1):
        step = make_step(replace(base, l3_after_layers=spread(base, layers)), corpus, device)
        steps = {"dense": dense, name: step}
        jobs = layer_jobs(step.model, step.batch[0], base.compile)
        rows, medians = _side_by_side(steps, jobs, repeats)
        # Each model in the pass that the step takes `accumulate` times; the plan serves all its layers.
        lookup = base.accumulate * (layers * medians["lookup"] + medians["plan"])
        projections = base.accumulate * layers * medians["projections"]
        for row, (model, each) in zip(rows, steps.items(), strict=True):
            here, reached = model == name, each.costs.flops_training * row["tokens_per_second"]
            row |= {
                "active_parameters": each.costs.active_parameters,
                "total_parameters": each.costs.total_parameters,
                "mean_rows": each.costs.mean_rows,
                "utilisation": reached / ceiling,
                "lookup_share": lookup / row["seconds"] if here else 0.0,
                "projections_share": projections / row["seconds"] if here else 0.0,
                "peak_bytes": peak_bytes(each.whole, device),
            }
        results += rows if not results else rows[1:]
        profiles[name] = profiled(step.whole, device)
        del step, steps, each
        gc.collect()  # compiling leaves cycles, and they hold tables of gigabytes
    return results, profiles


def layer_jobs(model: GPT, idx: Tensor, compiled: bool) -> dict[str, Callable[[], None]]:
    """A pass's plan, and for one L3 layer its lookup and its projections, forward and backward.

    The lookup copies the tables as autocast wants them, and adds their gradients to those of before.
    """
    layer = next(iter(model.l3_layers.values()))
    low = torch.bfloat16 if idx.is_cuda else layer.w_mix.weight.dtype
    like = dict(device=idx.device, dtype=low, requires_grad=True)
    query = torch.randn(idx.numel(), layer.n_embd, **like)
    found = torch.randn(idx.numel(), layer.d_emb, **like)
    tables = list(dict.fromkeys(layer.tables()))
    weights = [linear.weight for linear in layer.projections()]
    sums = [torch.zeros_like(table) for table in tables]

    def mixed(looked_up: Tensor, x: Tensor) -> Tensor:
        return layer.w_mix(torch.cat([rms_norm(layer.w_up(looked_up)), x], dim=-1))

    mix = torch.compile(mixed, dynamic=False) if compiled else mixed
    plan = layer.plan(idx)

    def lookup() -> None:
        with precision(model):
            output = layer.look_up(query, idx.flatten(), plan)
        _, *gradients = torch.autograd.grad(output, [query, *tables], found.detach())
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient

    def projections() -> None:
        with precision(model):
            output = mix(found, query)
        torch.autograd.grad(output, [query, found, *weights], torch.ones_like(output))

    return {"plan": lambda: layer.plan(idx), "lookup": lookup, "projections": projections}


def profiled(job: Callable[[], None], device: torch.device) -> list[dict]:
    """The operations of a warm job that take longest by themselves: calls, and share of the time.

    On CUDA, they are its kernels, and the time is the kernels' together.
    """
    job()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as watch:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
    taken = {}
    for event in watch.key_averages():
        if device.type == "cpu":
            taken[event.key] = event.self_cpu_time_total, event.count
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            taken[event.key] = event.self_device_time_total, event.count
    total = sum(time for time, _ in taken.values())
    longest = sorted(taken.items(), key=lambda item: -item[1][0])[:PROFILED]
    return [
        {"operation": name[:100], "calls": count, "share": time / total if total else 0.0}
        for name, (time, count) in longest
    ]
