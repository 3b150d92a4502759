"""Models of equal cost: what could stand in for a model with L3 layers, at its FLOPs per token.

To see what the lookup itself is worth, a model with L3 layers is compared with models that spend the
same in other ways.
"""

import math
from dataclasses import replace

from l3paper.costs.accounting import account
from l3paper.errors import at_least
from l3paper.gpt import GPTConfig
from l3paper.parts.rivals import KERNEL, TABLES


def match_wider(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model without L3 layers whose wider MLPs bring its FLOPs to those of the model `l3`.

    Raises ValueError if `l3` has no L3 layers, or has experts.
    """
    dense = _without_l3(l3)
    more = account(l3, mean_rows).flops_forward - account(dense).flops_forward
    return replace(dense, mlp_width=dense.hidden_width + round(more / (4 * l3.n_layer * l3.n_embd)))


def match_deeper(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model without L3 layers, of more blocks, whose FLOPs are those of the model `l3`.

    It has the fewest blocks more that reach the FLOPs; then all MLPs are narrowed to meet them.
    Raises ValueError if `l3` has no L3 layers, or has experts, or if no MLP is narrow enough.
    """
    dense, wanted = _without_l3(l3), account(l3, mean_rows).flops_forward
    now = account(dense).flops_forward
    block = account(replace(dense, n_layer=dense.n_layer + 1)).flops_forward - now
    more = math.ceil((wanted - now) / block)
    deeper = replace(dense, n_layer=dense.n_layer + more)
    excess = account(deeper).flops_forward - wanted
    mlp_width = deeper.hidden_width - round(excess / (4 * deeper.n_layer * l3.n_embd))
    if mlp_width < 1:
        raise ValueError(
            f"no model of {deeper.n_layer} blocks costs as little as this L3 model, however narrow its "
            "MLPs; give fewer positions (sequence_len) or a larger d_up"
        )
    return replace(deeper, mlp_width=mlp_width)


def more_steps(l3: GPTConfig, mean_rows: float, steps: int) -> int:
    """The steps in which the model without L3 layers costs what `l3` costs in `steps`."""
    dense = account(_without_l3(l3)).flops_forward
    return round(steps * account(l3, mean_rows).flops_forward / dense)


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
    # 2 * (e + 2 k w) FLOPs, the router being e of both.
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
            f"no mixture with experts_per_token = {k} costs {wanted.flops_forward:,.0f} FLOPs "
            f"per token and has {wanted.total_parameters:,} parameters, within tolerance = {tolerance}"
        )
    n_experts, expert_width = best
    return replace(
        dense, mlp_width=0, n_experts=n_experts, experts_per_token=k, expert_width=expert_width
    )


def match_mlp(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model with an MLP in the place of each L3 layer, whose FLOPs are those of the model `l3`.

    Raises ValueError if `l3` has no L3 layers, or has experts.
    """
    _, products = _per_layer(l3, mean_rows)
    return _with_rival(l3, "mlp", rival_d_up=round(products / (2 * l3.n_embd)))


def match_per_layer_embedding(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model with a PerLayerEmbedding in the place of each L3 layer, of equal FLOPs and parameters.

    Raises ValueError if `l3` has no L3 layers, or has experts, or is too small for it.
    """
    parameters, products = _per_layer(l3, mean_rows)
    d_emb = round((parameters - products) / l3.vocab_size)
    d_up = round((products - l3.n_embd**2) / (d_emb + l3.n_embd))
    return _with_rival(l3, "per-layer-embedding", rival_d_emb=d_emb, rival_d_up=d_up)


def match_engram(l3: GPTConfig, mean_rows: float) -> GPTConfig:
    """The model with an Engram layer in the place of each L3 layer, of equal FLOPs and parameters.

    Its tables are as wide as the FLOPs allow, and as long as the parameters allow. Raises ValueError
    if `l3` has no L3 layers, or has experts, or is too small for it.
    """
    parameters, products = _per_layer(l3, mean_rows)
    d_emb = max(1, round(products / (2 * l3.n_embd * TABLES)))
    rest = parameters - 2 * l3.n_embd * TABLES * d_emb - KERNEL * l3.n_embd
    return _with_rival(l3, "engram", rival_d_emb=d_emb, rival_rows=round(rest / d_emb))


STAND_INS = {
    "longer": lambda l3, mean_rows: _without_l3(l3),  # and trained for `more_steps`
    "wider": match_wider,
    "deeper": match_deeper,
    "moe": match_moe,
    "mlp": match_mlp,
    "per-layer-embedding": match_per_layer_embedding,
    "engram": match_engram,
}
"""The functions that find them, by the name that configurations use."""


def _per_layer(l3: GPTConfig, mean_rows: float) -> tuple[float, float]:
    """(parameters, products of a forward pass per token) that one L3 layer of the model adds."""
    costs, dense = account(l3, mean_rows), account(_without_l3(l3))
    layers = len(l3.l3_blocks)
    parameters = (costs.total_parameters - dense.total_parameters) / layers
    return parameters, (costs.flops_forward - dense.flops_forward) / (2 * layers)


def _with_rival(l3: GPTConfig, rival: str, **sizes: int) -> GPTConfig:
    if min(sizes.values()) < 1:
        raise ValueError(f"no {rival} layer costs as little as this L3 layer: it would have {sizes}")
    return replace(_without_l3(l3), rival=rival, rival_after_layers=l3.l3_after_layers, **sizes)


def _without_l3(config: GPTConfig) -> GPTConfig:
    if not config.l3_blocks:
        raise ValueError("l3_after_layers is ''; a model without L3 layers leaves nothing to match")
    if config.n_experts:
        raise ValueError(f"n_experts is {config.n_experts}; give an L3 model with dense blocks: 0")
    return replace(config, l3_after_layers="", l3_n_emb=0, l3_variant="")
