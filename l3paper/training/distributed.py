"""Several processes train one model, each on a part of the batch; their gradients are averaged.

DistributedDataParallel averages all gradients but those of the L3 tables. The gradient of a table has
hundreds of thousands of rows, most of them zero; the others depend on the positions of the batch alone,
and those are few. So every process sends the ids, queries and output gradients of its positions, and
computes the table's gradient for the whole batch. If tables are sharded, each process holds some of the
rows and their optimizer state; FSDP2 gathers them for the forward pass and divides the gradient, which
takes less memory and sends more bytes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from l3paper.gpt import GPT
from l3paper.lookup.operators import grouped
from l3paper.parts.device import pick_device


@dataclass(frozen=True)
class Group:
    """The processes of one run; by default this one alone."""

    rank: int = 0
    size: int = 1

    def part(self, batch: Tensor) -> Tensor:
        """This process's share of a batch (B, ...); B is a multiple of the processes."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, number: Tensor) -> Tensor:
        """The mean of the processes' numbers."""
        if self.size > 1:
            dist.all_reduce(number)
            number /= self.size
        return number

    def require_equal(self, what: str, number: int, device: torch.device) -> None:
        """Raise ValueError if the processes have different numbers."""
        mean = self.mean(torch.tensor(float(number), dtype=torch.float64, device=device))
        if self.any(mean != number, device):
            raise ValueError(f"{what} is {number} here, and another in other processes")

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is set in any process."""
        return bool(self.mean(torch.tensor(float(flag), device=device))) if self.size > 1 else flag


@contextmanager
def joined(device_name: str) -> Iterator[tuple[Group, torch.device]]:
    """The processes that torchrun started together, or this one alone, and its device.

    Raises ValueError as `pick_device` does.
    """
    device = pick_device(device_name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), device
    finally:
        # gloo's threads need the interpreter lock to free the tensors of finished work; the group's
        # destructor holds that lock while it waits for those threads. Let them finish first.
        time.sleep(1)
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process, of those that torchrun started, is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def parallel(model: GPT, group: Group, shard: bool) -> nn.Module:
    """The model as a module whose gradients are means over the processes; for one process, the model.

    Call this before making the optimizer: `shard` replaces parameters by sharded ones. Raises
    ValueError if `shard` is set for a single process.
    """
    if group.size == 1:
        if shard:
            raise ValueError("shard is set, but there is one process: start several with torchrun")
        return model
    mesh = init_device_mesh(model.device.type, (group.size,)) if shard else None
    for layer in model.l3_layers.values():
        if shard:
            own = {linear.weight for linear in layer.projections()}
            fully_shard(layer, mesh=mesh, reshard_after_forward=False, ignored_params=own)
        else:
            layer.lookup = SharedLookup(group)
    # Tables have an exchange of their own; buffers (bounds, angles) are equal everywhere and never
    # change.
    ignored = [*model.table_names(), *(name for name, _ in model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    unused = bool(model.config.n_experts)  # an expert that no position chose has no gradient
    return DistributedDataParallel(model, find_unused_parameters=unused)


def exchange(forward: nn.Module, now: bool) -> AbstractContextManager:
    """The context of one pass, in which the gradients of all processes are averaged if `now` is true.

    Once a batch, with its last pass, is enough. What L3 tables need is exchanged in every pass.
    """
    if now or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()


class SharedLookup:
    """A lookup whose gradient of the tables is the mean over the positions of all processes.

    Its signature is that of every lookup. All processes must ask for equally many positions.
    """

    def __init__(self, group: Group):
        self.group = group
        self.bytes_sent = 0
        """Bytes that this process has sent to all others together."""

    def __call__(
        self, query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        return _Shared.apply(query, keys, values, values is keys, token_ids, bounds, self)

    def gather(self, x: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, (size * n, ...), in the order of their ranks."""
        everything = x.new_empty(self.group.size * len(x), *x.shape[1:])
        dist.all_gather(list(everything.chunk(self.group.size)), x.contiguous())
        self.bytes_sent += (self.group.size - 1) * x.nbytes
        return everything


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, values, tied, token_ids, bounds, lookup):
        ctx.save_for_backward(query, keys, values, token_ids, bounds)
        ctx.tied, ctx.lookup = tied, lookup
        return grouped(query, token_ids, bounds, keys, keys if tied else values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        lookup, group = ctx.lookup, ctx.lookup.group
        own, *tables, token_ids, bounds = ctx.saved_tensors
        tables = [table.detach().requires_grad_() for table in tables[: 1 if ctx.tied else 2]]
        query = lookup.gather(own).requires_grad_()
        with torch.enable_grad():
            output = grouped(query, lookup.gather(token_ids), bounds, tables[0], tables[-1])
        wanted = query, *tables
        grad_query, *grads = torch.autograd.grad(output, wanted, lookup.gather(grad_output))
        grads = [grad / group.size for grad in grads] + [None] * ctx.tied
        return grad_query.chunk(group.size)[group.rank], *grads, None, None, None, None


def limit_gradients(model: nn.Module, most: float) -> Tensor:
    """The norm of all gradients together; if `most` is not 0, larger gradients are scaled to it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    norm = get_total_norm([p.grad for p in whole])
    if sharded:
        norm = (norm**2 + get_total_norm([p.grad for p in sharded]).full_tensor() ** 2) ** 0.5
    if most:
        clip_grads_with_norm_(whole, most, norm)
        clip_grads_with_norm_(sharded, most, norm)
    return norm


def unsharded(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Every sharded tensor gathered in CPU memory; nothing in processes that do not keep it.

    All processes must call this at the same time.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu()  # one by one: there is no room for all on the device
        if keep:
            gathered[name] = tensor
    return gathered


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process holds in full, sharded as `other` is, if that is sharded."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
