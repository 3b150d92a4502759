"""Models of equal cost: what could stand in for a model with L3 layers, at its FLOPs per token.

To see what the lookup itself is worth, a model with L3 layers is compared with models that spend the
same in other ways.
"""

import math
from dataclasses import replace

from l3paper.costs.accounting import account
from l3paper.errors import at_least
from l3paper.gpt import GPTConfig


def match_wider(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model without L3 layers whose wider MLPs bring its FLOPs to those of the model `l3`.

    Raises ValueError if `l3` has no L3 layers, or has experts.
    """
    dense = _without_l3(l3)
    more = account(l3, mean_rows).flops_forward - account(dense).flops_forward
    return replace(dense, mlp_width=dense.hidden_width + round(more / (4 * l3.n_layer * l3.n_embd)))


def match_deeper(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model without L3 layers that has so many blocks more that its FLOPs reach those of `l3`.

    Raises ValueError if `l3` has no L3 layers, or has experts.
    """
    dense, wanted = _without_l3(l3), account(l3, mean_rows).flops_forward
    now = account(dense).flops_forward
    block = account(replace(dense, n_layer=dense.n_layer + 1)).flops_forward - now
    return replace(dense, n_layer=dense.n_layer + max(0, math.ceil((wanted - now) / block)))


def match_moe(
    l3: GPTConfig, mean_rows: float, experts_per_token: int = 2, tolerance: float = 0.1
) -> GPTConfig:
    """The mixture of experts that has the FLOPs per token and the total parameters of the model `l3`.

    Its blocks are those of `l3`, with experts in place of the MLPs and without L3 layers. Both numbers
    are met as closely as whole numbers of experts and of hidden units allow, FLOPs twice as closely
    as parameters: the more experts it takes, the closer, within 1 % and 2 % from a dozen on.

    Raises ValueError if `l3` has no L3 layers, or has experts, and if no mixture comes within
    `tolerance` of the parameters and half of it of the FLOPs.
    """
    k, wanted = experts_per_token, account(l3, mean_rows)
    at_least(1, experts_per_token=k)
    dense = _without_l3(l3)
    rest, unit = account(dense), l3.n_layer * l3.n_embd
    # In units of n_layer * n_embd, e experts of width w have e * (1 + 2 w) parameters and cost
    # 2 * (e + 2 k w) operations, the router being e of both.
    parameters = (wanted.total_parameters - rest.total_parameters + rest.parameters["mlp"]) / unit
    products = (wanted.flops_forward - rest.flops_forward + rest.flops["mlp"]) / (2 * unit)

    def miss(size: tuple[int, int]) -> float:
        e, w = size
        flops = abs(e + 2 * k * w - products) * 2 * unit / wanted.flops_forward
        return max(2 * flops, abs(e * (1 + 2 * w) - parameters) * unit / wanted.total_parameters)

    # Of two solutions, narrow experts under a vast router are the other: below this width, the router
    # costs more than the experts.
    narrowest = max(1, math.ceil(products / (4 * k)))
    sizes = [
        (max(k, math.floor(parameters / (1 + 2 * w)) + more), w)
        for w in range(narrowest, math.ceil(products / k))
        for more in (0, 1)
    ]
    best = min(sizes, key=miss, default=None)
    if best is None or miss(best) > tolerance:
        raise ValueError(
            f"no mixture with experts_per_token = {k} costs {wanted.flops_forward:,.0f} operations "
            f"per token and has {wanted.total_parameters:,} parameters, within tolerance = {tolerance}"
        )
    n_experts, expert_width = best
    return replace(
        dense, mlp_width=0, n_experts=n_experts, experts_per_token=k, expert_width=expert_width
    )


STAND_INS = {"wider": match_wider, "deeper": match_deeper, "moe": match_moe}
"""The functions that find them, by the name that configurations use."""


def _without_l3(config: GPTConfig) -> GPTConfig:
    if not config.l3_blocks:
        raise ValueError("l3_after_layers is ''; a model without L3 layers leaves nothing to match")
    if config.n_experts:
        raise ValueError(f"n_experts is {config.n_experts}; give an L3 model with dense blocks: 0")
    return replace(config, l3_after_layers="", l3_n_emb=0, l3_variant="")
