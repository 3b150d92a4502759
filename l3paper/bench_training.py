"""How fast models train, side by side, and where the time of a step goes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from l3paper.accounting import Accounting
from l3paper.catalogue import DENSE, EXPERIMENTS
from l3paper.config import TrainConfig
from l3paper.data import TokenizedCorpus, load_corpus, training_batch
from l3paper.device import precision
from l3paper.gpt import GPT
from l3paper.layer import L3Layer
from l3paper.optim import MuonAdamW
from l3paper.timing import interleaved_medians, peak_bytes, product_speed
from l3paper.train import build_model

_PAPER = TrainConfig(
    vocab_size=32768, sequence_len=1024, batch_size=256, l3_n_emb=710_000, l3_k_max=512, compile=True
)
SIZES = {
    "smoke": TrainConfig(
        vocab_size=512, depth=2, n_embd=32, sequence_len=64, batch_size=8, accumulate=2, l3_n_emb=1024
    ),
    "100M": replace(_PAPER, depth=8, n_embd=768, n_head=6, accumulate=8),
    "400M": replace(_PAPER, depth=20, n_embd=1152, n_head=9, accumulate=16),
}
"""Models by their active parameters, with the paper's number of rows and its cap."""

PROFILED = 12
"""Operations that a profile names, the longest first."""


@dataclass(frozen=True)
class Step:
    """A step of training in two halves, to be timed apart: one pass of a batch, and the update."""

    model: GPT
    costs: Accounting
    optimizer: MuonAdamW
    batch: tuple[Tensor, Tensor]
    """Inputs and targets (b, T), on the model's device."""

    def gradients(self) -> None:
        with precision(self.model):
            loss = self.model(*self.batch) + self.model.auxiliary_loss()
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> None:
        self.gradients()
        self.update()


def make_step(config: TrainConfig, corpus: TokenizedCorpus, device: torch.device) -> Step:
    """The configuration's model, and one pass of its first batch."""
    model, costs = build_model(config, corpus)
    model.to(device)
    if config.compile:
        model.compile_parts()
    passing = config.batch_size // config.accumulate
    batch = training_batch(corpus.train, passing, config.sequence_len, seed=0, step=0)
    return Step(model, costs, model.setup_optimizer(), tuple(part.to(device) for part in batch))


def bench_train_step(experiment: str, preset: str, repeats: int, device: torch.device) -> list[dict]:
    """A training step of every model of an experiment, and the optimizer's share of it.

    The experiment's first model is dense.
    """
    configs = EXPERIMENTS[experiment].configs(preset, "stdlib")
    jobs, corpora = {}, {}
    for name, config in configs.items():
        key = config.vocab_size, config.data_bytes
        corpora[key] = corpus = corpora.get(key) or load_corpus(config.data, *key)
        step = make_step(config, corpus, device)
        jobs |= {f"{name}: gradients": step.gradients, f"{name}: optimizer": step.update}
    medians = interleaved_medians(jobs, repeats)
    steps = {
        name: config.accumulate * medians[f"{name}: gradients"] + medians[f"{name}: optimizer"]
        for name, config in configs.items()
    }
    dense = next(iter(steps.values()))
    return [
        {
            "model": name,
            "seconds": seconds,
            "tokens_per_second": configs[name].batch_size * configs[name].sequence_len / seconds,
            "optimizer_share": medians[f"{name}: optimizer"] / seconds,
            "speed_of_dense": dense / seconds,
        }
        for name, seconds in steps.items()
    ]


def bench_throughput(size: str, repeats: int, device: torch.device) -> tuple[list[dict], dict]:
    """Dense against one and two L3 layers at equal depth, a pair at a time; and a profile of each.

    A step is `accumulate` passes and one update, whose times are taken apart. "utilisation" is the
    share of the speed of one large product, in the type that the model computes in, that the step's
    operations reach, by the accounting. The shares of lookups and projections are those of all L3
    layers, each timed by itself on the pass's ids.
    """
    base = SIZES[size]
    corpus = load_corpus(base.data, base.vocab_size)
    ceiling = product_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    after = {"L3": str(base.depth // 2), "L3, two layers": f"{base.depth // 3},{2 * base.depth // 3}"}
    dense = make_step(replace(base, **DENSE), corpus, device)
    results, profiles = [], {"dense": profiled(dense.whole, device)}
    for name, blocks in after.items():
        step = make_step(replace(base, l3_after_layers=blocks), corpus, device)
        rows = _pair(base, {"dense": dense, name: step}, repeats, device, ceiling)
        results += rows if not results else rows[1:]
        profiles[name] = profiled(step.whole, device)
        del step  # its tables and their moments leave no room for the next
    return results, profiles


def _pair(
    config: TrainConfig, steps: dict[str, Step], repeats: int, device: torch.device, ceiling: float
) -> list[dict]:
    jobs: dict[str, Callable[[], None]] = {}
    for name, step in steps.items():
        jobs |= {f"{name}: gradients": step.gradients, f"{name}: optimizer": step.update}
        for layer in list(step.model.l3_layers.values())[:1]:
            jobs |= layer_jobs(layer, step.model, step.batch[0])
    medians = interleaved_medians(jobs, repeats)
    tokens, passes = config.batch_size * config.sequence_len, config.accumulate
    rows = []
    for name, step in steps.items():
        update = medians[f"{name}: optimizer"]
        seconds = passes * medians[f"{name}: gradients"] + update
        layers = passes * len(step.model.l3_layers)
        rows.append(
            {
                "model": name,
                "active_parameters": step.costs.active_parameters,
                "total_parameters": step.costs.total_parameters,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "utilisation": step.costs.flops_training * tokens / seconds / ceiling,
                "optimizer_share": update / seconds,
                "lookup_share": layers * medians.get("lookup", 0.0) / seconds,
                "projections_share": layers * medians.get("projections", 0.0) / seconds,
                "peak_bytes": peak_bytes(step.whole, device),
            }
        )
    speeds = [row["tokens_per_second"] for row in rows]
    return [row | {"speed_of_dense": s / speeds[0]} for row, s in zip(rows, speeds, strict=True)]


def layer_jobs(layer: L3Layer, model: GPT, idx: Tensor) -> dict[str, Callable[[], None]]:
    """A layer's lookup with its plan, and its projections: forward and backward, each by itself."""
    low = torch.bfloat16 if idx.is_cuda else layer.w_mix.weight.dtype
    like = dict(device=idx.device, dtype=low)
    query = torch.randn(idx.numel(), layer.n_embd, **like, requires_grad=True)
    found = torch.randn(idx.numel(), layer.d_emb, **like, requires_grad=True)
    tables = {id(table): table.detach().to(low).requires_grad_() for table in layer.tables()}
    keys, values = (tables[id(table)] for table in layer.tables())

    def lookup() -> None:
        plan = partial(layer.lookup, plan=layer.plan(idx))
        output = plan(query, idx.flatten(), layer.bounds, keys, values)
        torch.autograd.grad(output, [query, *tables.values()], found.detach())

    def projections() -> None:
        with precision(model):
            output = layer.mix(found, query)
        weights = [linear.weight for linear in layer.projections()]
        torch.autograd.grad(output, [query, found, *weights], torch.ones_like(output))

    return {"lookup": lookup, "projections": projections}


def profiled(job: Callable[[], None], device: torch.device) -> list[dict]:
    """The operations of a warm job that take longest by themselves: calls, and share of the time."""
    job()
    activity = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activity) as watch:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
    what = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = {event.key: (getattr(event, what), event.count) for event in watch.key_averages()}
    total = sum(time for time, _ in events.values())
    longest = sorted(events.items(), key=lambda item: -item[1][0])[:PROFILED]
    return [
        {"operation": name, "calls": count, "share": time / total} for name, (time, count) in longest
    ]
