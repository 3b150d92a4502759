"""The checkers and the figures of notebook 08."""

import matplotlib.pyplot as plt
import pytest
import torch

from l3paper.insight.record import lens_drops
from l3paper.notebooks.drawings import insight as draw
from l3paper.notebooks.exercises import check

WEIGHTS, IDS = torch.eye(4)[[0, 1, 2, 3]], torch.tensor([0, 0, 1, 1])
CONTEXT = {
    "08.3": {"loss_with": lambda weights: 2.5, "weights": WEIGHTS, "token_ids": IDS, "before": 2}
}


def information(weights):
    entropy = torch.special.entr(weights).sum(dim=-1)
    return torch.special.entr(weights.mean(dim=0)).sum() - entropy.mean()


def previous_of_token(weights, token_ids):
    swapped = weights.clone()
    for token in token_ids.unique():
        here = (token_ids == token).nonzero().flatten()
        swapped[here] = weights[here.roll(1)]
    return swapped


def lead(lens, controls):
    """Over the largest drop of the controls at the same place."""
    ours, *others = [lens_drops({"lens": one}) for one in (lens, *controls)]
    leads = {}
    for depth in (d for d in ours if d.startswith("L3")):
        place = depth.removeprefix("L3")
        leads[depth] = ours[depth] - max(o[d] for o in others for d in o if d.endswith(place))
    best = max(leads, key=leads.get)
    return best, leads[best]


def largest_drop(lens, controls):
    drops = {d: drop for d, drop in lens_drops({"lens": lens}).items() if d.startswith("L3")}
    return max(drops, key=drops.get), max(drops.values())


def mean_of_token(weights, token_ids):
    return torch.stack([weights[token_ids == token].mean(dim=0) for token in token_ids])


RIGHT = [
    ("08.1", lambda weights: 1 / weights.square().sum()),
    ("08.2", information),
    ("08.3", previous_of_token),
    ("08.4", lead),
]


@pytest.mark.parametrize(("exercise", "answer"), RIGHT)
def test_right_answers_pass(exercise, answer, capsys):
    check(exercise, answer, **CONTEXT.get(exercise, {}))
    assert capsys.readouterr().out.endswith(f"exercise {exercise}: correct\n")


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"),
    [
        ("08.1", lambda weights: torch.special.entr(weights).sum().exp(), "should give 2.667"),
        ("08.2", lambda weights: -information(weights), "which of the entropies is larger"),
        ("08.2", lambda w: (w * (w / w.mean(0)).log()).sum(-1).mean(), "is 0 log 0 taken care of"),
        ("08.3", lambda weights, ids: weights.roll(1, dims=0), "each token must keep its own"),
        ("08.3", lambda weights, ids: weights, "only 0% of the positions"),
        ("08.3", lambda weights, ids: weights.roll(1, dims=1), "every softmax must stay as it is"),
        ("08.3", mean_of_token, "every softmax must stay as it is"),
        ("08.4", largest_drop, "look what the controls do in its place"),
        ("08.4", lambda lens, controls: ("L3 after 1", 3.0), "the lead is over the best control"),
    ],
)
def test_wrong_answers_get_a_hint(exercise, answer, hint):
    with pytest.raises(AssertionError, match=hint):
        check(exercise, answer, **CONTEXT.get(exercise, {}))


def test_controls_stand_at_the_depths_of_the_layers():
    depths = {
        "dense": ["embedding", "block 0", "block 1"],
        "l3": ["embedding", "block 0", "L3 after 0", "block 1"],
        "mlp": ["embedding", "block 0", "mlp after 0", "block 1"],
    }
    curves = {name: [[1.0] * len(found)] * 2 for name, found in depths.items()}
    (ax,) = draw.lens(depths, curves).axes
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert lines["dense"] == [0, 1, 3]
    assert lines["MLP in place"] == lines["L3"] == [0, 1, 2, 3]
    plt.close(ax.figure)


def test_the_parts_of_a_choice_are_stacked():
    fig = draw.choice({"toy": [[0.1], [0.2]]}, {"layer": [[0.3, 0.5], [0.2, 0.2]]})
    ends = [[bar.get_x() + bar.get_width() for bar in ax.patches] for ax in fig.axes]
    assert ends[0] == pytest.approx([0.1, 0.3])
    assert ends[1] == pytest.approx([0.4, 0.6])
    plt.close(fig)


def test_dead_rows_are_drawn_in_percent():
    fig = draw.dead_rows([0, 10], {"layer": [[0.0, 0.2], [0.1, 0.4]]})
    assert fig.axes[0].lines[0].get_ydata() == pytest.approx([5, 30])
    plt.close(fig)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n  b", "`a b`"),
        ("x|`y`", "`x\\|'y'`"),
        ("\ufffd\x00", "`□□`"),
        ("abc" * 20, f"`c{'abc' * 9}`"),
    ],
)
def test_texts_fit_into_a_table(text, shown):
    assert draw.one_line(text) == shown
