"""Checkers of notebook 08."""

import math

from l3paper.insight.rows import choices


def check_1(answer):
    """answer(weights) is the number of rows that a softmax uses."""
    for weights, expected in (([0.25] * 4, 4), ([1.0, 0.0], 1), ([0.5, 0.25, 0.25], 2**1.5)):
        assert math.isclose(answer(weights), expected), f"{weights} uses {expected:.3f} rows"


def check_2(answer):
    """answer(steps) is the L3 step with the largest drop, and its share of all drops."""
    steps = {"block 0": 3.0, "L3 after 0": 1.0, "block 1": 4.0, "L3 after 1": 2.0}
    assert answer(steps) == ("L3 after 1", 0.2), f"not for {steps}"


def check_3(answer, model, idx, streams):
    """answer(layer, x, ids) is the mean distance from uniform where a token owns several rows."""
    block, choice = next(iter(choices(model, idx).items()))
    layer, x = model.l3_layers[str(block)], streams[f"block {block}"].flatten(0, 1)
    expected = float(choice.distance[choice.rows > 1].mean())
    found = float(answer(layer, x, idx.flatten()))
    assert math.isclose(found, expected, rel_tol=1e-4), "did you leave out tokens with a single row?"
