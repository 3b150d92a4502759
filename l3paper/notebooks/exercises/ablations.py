"""Checkers of notebook 06."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from l3paper import L3Layer, allocation_to_bounds
from l3paper.costs.accounting import account
from l3paper.experiments.catalogue import SMALL
from l3paper.experiments.statistics import POWER, share_contrast
from l3paper.gpt import GPTConfig
from l3paper.layer import rms_norm


def check_1(answer: type[L3Layer]) -> None:
    """`answer` is an L3Layer in which all rows of a token weigh the same."""
    assert isinstance(answer, type), "give the class, not a layer of it"
    assert issubclass(answer, L3Layer), "inherit from L3Layer"
    torch.manual_seed(2)
    layer = answer(n_embd=8, n_emb=6, d_up=12, bounds=allocation_to_bounds([2, 3, 1])).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, ids = torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([[0, 1, 2], [1, 1, 0]])
    means = torch.stack([layer.kv_weight[a:b].mean(0) for a, b in ((0, 2), (2, 5), (5, 6))])[ids]
    looked_up = layer.look_up(rms_norm(x), ids)
    summed = means * torch.tensor([2.0, 3.0, 1.0])[ids][..., None]
    assert not torch.allclose(looked_up, summed), "the weights must still sum to 1: a mean, not a sum"
    assert torch.allclose(looked_up, means), "the context must not matter: each row weighs 1 / d_t"
    expected = layer.w_mix(torch.cat([rms_norm(layer.w_up(means)), x], dim=-1))
    assert torch.allclose(layer(x, ids), expected), "change the weights only, and leave the rest"


def check_2(answer: Callable[[float, int], float]) -> None:
    """answer(deviation, seeds) is the smallest gain that so many seeds show with power 0.8."""
    from scipy import stats

    for deviation, seeds in ((0.01, 3), (0.01, 8), (0.02, 16)):
        t = stats.t.ppf(0.975, seeds - 1)
        low, high = 0.0, 100 * deviation
        while high - low > 1e-4 * deviation:
            middle = (low + high) / 2
            power = stats.nct.sf(t, seeds - 1, middle / deviation * seeds**0.5)
            low, high = (low, middle) if power >= POWER else (middle, high)
        half, found = t * deviation / seeds**0.5, answer(deviation, seeds)
        where = f"with {seeds} seeds and a deviation of {deviation}"
        assert not math.isclose(found, half, rel_tol=0.02), (
            f"{where}: a true gain as large as the half width is shown only half of the time"
        )
        assert math.isclose(found, high, rel_tol=0.1), f"{where}: {found:.4f} is off by more than 10 %"


def check_3(answer: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> None:
    """answer(part, whole) are the least and the largest share that a test at 5 % does not reject."""
    whole = [0.050, 0.056, 0.047, 0.053]
    for part in ([0.026, 0.027, 0.022, 0.029], [0.049, 0.058, 0.044, 0.055]):
        kept = [
            share
            for share in (i / 100 for i in range(201))
            if share_contrast(part, whole, share).low <= 0 <= share_contrast(part, whole, share).high
        ]
        low, high = answer(part, whole)
        assert low < high, "give the least share first, then the largest"
        hint = "for each share, does the 95 % interval of part - share * whole contain 0?"
        wrong = max(abs(low - kept[0]), abs(high - kept[-1]))
        assert wrong < 0.015, f"for {part} of {whole}, {low:.2f} to {high:.2f} is wrong: {hint}"


def check_4(answer: Mapping[str, Mapping[str, object]]) -> None:
    """`answer` are two families, "one table" and "two tables", that differ in little else."""
    assert set(answer) == {"one table", "two tables"}, "give two families of these names"
    allowed = {"l3_after_layers", "l3_n_emb", "l3_d_up"}
    stray = {setting for changes in answer.values() for setting in changes} - allowed
    assert not stray, f"{', '.join(sorted(stray))}: leave everything else as it is"
    base = SMALL["laptop"]
    one, two = (replace(base, **answer[f]).model_config() for f in ("one table", "two tables"))
    assert (len(one.l3_blocks), len(two.l3_blocks)) == (1, 2), "how many tables has each family?"
    assert one.l3_n_emb == 2 * two.l3_n_emb, "l3_n_emb counts the rows of each table: are totals equal?"
    outer = {0, base.depth - 1}
    for name, config in (("one table", one), ("two tables", two)):
        assert not outer & set(config.l3_blocks), (
            f"{name}: an outer place would make the family worse for another reason"
        )
    flops = [
        account(config, 4.0 * config.l3_n_emb / base.vocab_size).flops_forward for config in (one, two)
    ]
    more = flops[1] / flops[0] - 1
    assert abs(more) < 0.02, f"two tables take {more:+.1%} FLOPs: which setting decides a layer's work?"


def check_5(answer: Mapping[str, object], model: GPTConfig) -> None:
    """`answer` are the changes that give `model` L3 layers within the budget of the exercise."""
    config = replace(model, **answer)
    assert config.l3_blocks, "l3_after_layers names no block"
    others = {name for name in answer if not name.startswith("l3_")}
    assert not others, f"{', '.join(sorted(others))}: the model itself must stay as it is"
    assert min(config.l3_blocks) >= 3, "the first rows must have four blocks' time to arrive"
    assert max(config.l3_blocks) < config.n_layer - 1, "no block would follow the last layer"
    rows = config.l3_k_max
    cost = account(config, float(rows))  # at most: as if every token owned as many as the cap allows
    moved, size = cost.touched_bytes(2), cost.table_bytes(2)
    assert moved <= 2**20, f"a token at the cap moves {moved:,.0f} bytes; at most {2**20:,}"
    assert size <= 2e9, f"the tables take {size:,} bytes; at most 2,000,000,000"
    more = cost.flops_forward / account(model).flops_forward - 1
    assert more <= 0.03, f"{more:.1%} more FLOPs per token; at most 3 %"
    assert size >= 0.9 * 2e9, (
        f"only {size / 2e9:.0%} of the memory is used: there is room for more rows"
    )
