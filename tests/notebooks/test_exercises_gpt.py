"""The checkers and drawings of notebook 03: right answers pass, typical wrong ones get a hint."""

import matplotlib.pyplot as plt
import pytest
import torch

from l3paper import GPT, GPTConfig, allocation_to_bounds
from l3paper.costs.accounting import account
from l3paper.notebooks.drawings import gpt as draw
from l3paper.notebooks.exercises.gpt import check_1, check_2, check_3, check_4

SIZES = dict(sequence_len=8, vocab_size=4, n_layer=2, n_head=2, n_kv_head=2, n_embd=8)
CONFIG = GPTConfig(**SIZES, l3_after_layers="0", l3_n_emb=10, l3_k_max=5)
BOUNDS = allocation_to_bounds([1, 2, 5, 2])
IDX = torch.tensor([[2, 1, 0, 2, 3]])


def insert(model, layer, after, ids=None, attribute=True):
    """The solution of exercise 2; with `ids`, these whatever the batch."""
    seen = {"idx": ids}
    if ids is None:
        model.register_forward_pre_hook(lambda module, args: seen.update(idx=args[0]))
    block = model.blocks[after]
    block.register_forward_hook(lambda block, args, x: x + layer(x, seen["idx"].expand(x.shape[:2])))
    if attribute:
        block.l3 = layer


def test_exercise_1():
    check_1(({1, 2, 3, 4}, {1}), CONFIG, BOUNDS, IDX)
    with pytest.raises(AssertionError, match="after block 0"):
        check_1(({1}, {1}), CONFIG, BOUNDS, IDX)
    with pytest.raises(AssertionError, match="after block 1"):
        check_1(({1, 2, 3, 4}, {1, 2, 3, 4}), CONFIG, BOUNDS, IDX)


def test_exercise_2():
    check_2(insert, CONFIG, BOUNDS)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda model, layer, after: None, "ignore it"),
        (lambda *args: insert(*args, attribute=False), "misses the layer"),
        (lambda *args: insert(*args, ids=torch.zeros(1, 1, dtype=torch.long)), "this very batch"),
        (lambda model, layer, after: insert(model, layer, after + 1), "differ"),
        (lambda model, layer, after: model.wte.weight.data.zero_(), "fresh layer"),
    ],
)
def test_wrong_answers_to_exercise_2(wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        check_2(wrong, CONFIG, BOUNDS)


def test_exercise_3():
    check_3({"w_mix.weight"}, CONFIG, BOUNDS)
    with pytest.raises(AssertionError, match="columns of W_mix"):
        check_3({"w_mix.weight", "w_up.weight"}, CONFIG, BOUNDS)
    with pytest.raises(AssertionError, match="the names are"):
        check_3({"w_mix"}, CONFIG, BOUNDS)


def test_exercise_4():
    def solution(config, mean_rows):
        c = config.n_embd
        return round((22 * c * c + 4 * c * (config.sequence_len - mean_rows)) / (4 * c))

    check_4(solution, 29.3)
    with pytest.raises(AssertionError, match="attention scores"):
        check_4(lambda config, mean_rows: 5.5 * config.n_embd, 29.3)


def test_drawings():
    fig = draw.where_it_sits(["in", "cat", "cat"], "cat", n_layer=3, after=1)
    texts = {text.get_text() for text in fig.axes[0].texts}
    assert {"block 2", "L3 layer", "cat", "in"} <= texts
    assert "block 3" not in texts
    cost = {"dense": account(GPTConfig(**SIZES)), "dense + L3": account(CONFIG, 3.0)}
    parts = ({name: getattr(c, kind) for name, c in cost.items()} for kind in ("parameters", "flops"))
    fig = draw.costs(*parts)
    totals = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert totals[0] == f"{cost['dense'].total_parameters / 1e6:.2f} M"
    assert len(totals) == 4
    plt.close("all")


def test_every_part_of_a_model_with_l3_has_a_colour():
    cost = account(CONFIG, 3.0)
    assert set(draw.PARTS) == {*cost.parameters, *cost.flops}
    assert sum(p.numel() for p in GPT(CONFIG).parameters()) == cost.total_parameters
