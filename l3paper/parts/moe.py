"""A mixture of experts in place of an MLP: the sparse layer that L3 is measured against.

Every position chooses experts_per_token of n_experts small MLPs. The pairs (position, choice), sorted
by expert, fall into one contiguous slice per expert, so that an expert is one pair of dense products.
Experts have no capacity limit: no choice is dropped or padded.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.errors import at_least
from l3paper.parts.device import eager, float32_or_better

BALANCE_WEIGHT = 0.01
"""Weight of the load balancing loss (Fedus et al. 2021, arXiv:2101.03961; OLMoE, arXiv:2409.02060)."""

Z_WEIGHT = 0.001
"""Weight of the router z loss (ST-MoE, Zoph et al. 2022, arXiv:2202.08906; OLMoE)."""

ROUTER_STD = 0.02
"""Standard deviation of a fresh router: small, so that training starts from an even choice."""


class MoE(nn.Module):
    """Mixture of experts: token choice, top-k, softmax router, ReLU squared, dropless.

        p = softmax(W_router x)
        y = sum over the k likeliest experts e of p_e W_proj,e relu(W_fc,e x)^2

    The weights p_e stay as they are, as in OLMoE: those of the chosen experts sum to less than 1.

    A forward pass leaves behind `auxiliary`, the loss (a scalar with gradients) that keeps the load
    even and the router's logits small, and `load` (n_experts,), each expert's share of the choices.

    Args:
        n_embd: width of the residual stream.
        n_experts: experts of the layer.
        experts_per_token: experts that a position chooses.
        expert_width: hidden width of an expert.

    Raises ValueError for sizes below 1 and for more experts per token than there are.
    """

    auxiliary: Tensor | None
    load: Tensor | None

    def __init__(self, n_embd: int, n_experts: int, experts_per_token: int, expert_width: int):
        super().__init__()
        at_least(1, n_embd=n_embd, n_experts=n_experts, expert_width=expert_width)
        if not 1 <= experts_per_token <= n_experts:
            raise ValueError(
                f"experts_per_token is {experts_per_token}; it must be 1 .. n_experts = {n_experts}"
            )
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        # One matrix per expert, not one tensor for all: Muon makes each matrix orthogonal by itself.
        self.c_fc = nn.ParameterList(torch.empty(expert_width, n_embd) for _ in range(n_experts))
        self.c_proj = nn.ParameterList(torch.empty(n_embd, expert_width) for _ in range(n_experts))
        self.auxiliary = self.load = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter again; the output projections start at zero, so it adds nothing."""
        nn.init.normal_(self.router.weight, std=ROUTER_STD, generator=generator)
        for fc, proj in zip(self.c_fc, self.c_proj, strict=True):
            nn.init.normal_(fc, std=fc.shape[1] ** -0.5, generator=generator)
            nn.init.zeros_(proj)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_embd), at least one position, to its experts' weighted outputs (..., n_embd)."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        logits = self._router_logits(flat)  # (N, E)
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # (N, k)
        experts = torch.arange(len(self.c_fc), device=x.device)
        count = (chosen.flatten()[:, None] == experts).sum(dim=0)  # (E,)
        self.load = count.to(logits.dtype) / chosen.numel()
        if dist.is_initialized():  # even over the positions of all processes
            dist.all_reduce(self.load)
            self.load /= dist.get_world_size()
        balance = len(count) * (self.load * probabilities.mean(dim=0)).sum()
        z = logits.logsumexp(dim=-1).square().mean()
        self.auxiliary = BALANCE_WEIGHT * balance + Z_WEIGHT * z
        return self._mix(flat, weights, chosen, count).view_as(x)

    def _router_logits(self, flat: Tensor) -> Tensor:
        """In float32 or better: rounded to bfloat16, close probabilities would change the choice."""
        with torch.autocast(flat.device.type, enabled=False):
            precise = float32_or_better(self.router.weight.dtype)
            return F.linear(flat.to(precise), self.router.weight.to(precise))

    @eager  # the loop runs over sizes that differ from batch to batch
    def _mix(self, flat: Tensor, weights: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)  # (N * k,)
        position = order // self.experts_per_token
        x = F.embedding(position, flat)  # (N * k, C)
        parts = zip(x.split(count.tolist()), self.c_fc, self.c_proj, strict=True)
        # An expert without positions gets no gradient, so that the optimizer skips it: with a zero
        # gradient, Muon would still take a full step along its old momentum.
        out = torch.cat([_expert(part, fc, proj) for part, fc, proj in parts if len(part)])
        out = out * weights.flatten()[order, None].to(out.dtype)  # (N * k, C)
        return torch.zeros_like(flat, dtype=out.dtype).index_add(0, position, out)  # (N, C)

    def __getstate__(self) -> dict:
        """The state for copies and pickles, which cannot hold the graph behind `auxiliary`."""
        return super().__getstate__() | {"auxiliary": None}


def _expert(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    hidden = F.linear(x, fc).relu()
    return F.linear(hidden * hidden, proj)  # in autocast's type, which square() would leave
