"""Cross-entropy from hidden states, a chunk of positions at a time.

The logits (positions x vocabulary) are by far the largest tensor of a training step. Their gradient
is known as soon as they are, so each chunk of them is made, turned into gradients of the hidden
states and of the head, and dropped: no more than a chunk ever exists.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from l3paper.parts.device import float32_or_better

CHUNK_NUMBERS = 2**20
"""Logits held at a time on a CPU: 4 MB in float32, which stay in its cache. Accelerators take 64 times
as many, since they need large products."""


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Squash logits smoothly into -cap .. cap."""
    return cap * torch.tanh(logits / cap)


def chunk_cross_entropy(
    logits: Tensor, target: Tensor, keep: Tensor, count: Tensor, cap: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses of a chunk, summed, and the gradient of its share of their mean by its logits.

    logits (n, V), before the cap, are overwritten if they are float32 or better; target (n, 1); keep
    (n, 1) is True where a loss counts, and `count` is how many do in all chunks. The gradient is of
    the logits' type.
    """
    dtype = logits.dtype
    logits = logits.to(float32_or_better(dtype))
    capped = logits.div_(cap).tanh_()  # soft_cap(logits) / cap
    slope = 1 - capped.square() if with_gradient else None
    capped.mul_(cap)
    log_z = capped.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    total = ((log_z - capped.gather(1, target)) * keep).sum()
    if not with_gradient:
        return total, None
    grad = capped.sub_(log_z).exp_()  # the softmax
    grad.scatter_add_(1, target, torch.full_like(log_z, -1.0))
    return total, grad.mul_(slope).mul_(keep / count.to(grad.dtype)).to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float,
    ignore_index: int = -1,
    chunk: Callable = chunk_cross_entropy,
) -> Tensor:
    """Mean over targets of cross_entropy(soft_cap(hidden @ weight.T), targets), in nats.

    hidden (N, C), weight (V, C), targets (N,) -> scalar in float32 (float64 for float64 input).
    Targets equal to `ignore_index` do not count. `chunk` is `chunk_cross_entropy`, or that compiled.
    Gradients flow to hidden and weight, once: a second derivative raises RuntimeError.
    Raises ValueError if no target counts. On an accelerator the result is NaN instead, since the check
    would have to wait for the device.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    kept = targets != ignore_index
    if targets.device.type == "cpu" and not kept.any():
        raise ValueError(f"targets are all {ignore_index} (ignored): there is nothing to average")
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, kept, cap, with_gradient, chunk)


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """The loss of every target by itself, in nats, without gradients; 0 for targets of -1.

    hidden (N, C), weight (V, C), targets (N,) -> (N,) in float32 (float64 for float64 input).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    matrix, step = weight.to(hidden.dtype), _chunk_length(hidden, weight)
    losses = [
        F.cross_entropy(
            soft_cap((part @ matrix.T).to(float32_or_better(hidden.dtype)), cap),
            target,
            ignore_index=-1,
            reduction="none",
        )
        for part, target in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, cap, with_gradient, chunk):
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=float32_or_better(hidden.dtype))
        count = kept.sum()
        if with_gradient:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight)
        step = _chunk_length(hidden, weight)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            keep = kept[part, None]  # (n, 1)
            target = targets[part, None].where(keep, 0)  # (n, 1)
            logits = hidden[part] @ matrix.T  # (n, V)
            loss, grad = chunk(logits, target, keep, count, cap, with_gradient)
            total += loss
            if with_gradient:
                torch.mm(grad, matrix, out=grad_hidden[part])
                grad_weight += grad.T @ hidden[part]
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None, None


def _chunk_length(hidden: Tensor, weight: Tensor) -> int:
    held = CHUNK_NUMBERS if hidden.device.type == "cpu" else 64 * CHUNK_NUMBERS
    return max(1, held // len(weight))
