"""The checkers and drawings of notebook 06: right answers pass, typical wrong ones get a hint."""

import matplotlib.pyplot as plt
import pytest

from l3paper import GPTConfig, L3Layer
from l3paper.experiments.statistics import over_seeds, seeds_needed, share_contrast
from l3paper.notebooks.drawings import ablations as draw
from l3paper.notebooks.exercises.ablations import check_1, check_2, check_3, check_4, check_5


class EqualWeights(L3Layer):
    def look_up(self, query, token_ids, plan=None):
        return super().look_up(0 * query, token_ids, plan)


class Summed(EqualWeights):
    def look_up(self, query, token_ids, plan=None):
        owned = self.bounds.diff()[token_ids][..., None]
        return owned * super().look_up(query, token_ids, plan)


class NoMix(EqualWeights):
    def forward(self, x, token_ids, plan=None):
        return self.look_up(x, token_ids)


def test_exercise_1():
    check_1(EqualWeights)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (EqualWeights(4, 4, 4), "the class"),
        (dict, "inherit"),
        (L3Layer, "must not matter"),
        (Summed, "a mean, not a sum"),
        (NoMix, "leave the rest"),
    ],
)
def test_wrong_answers_to_exercise_1(wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        check_1(wrong)


def smallest_gain(deviation, seeds):
    gains = (deviation * i / 10 for i in range(5, 60))
    return next(g for g in gains if (seeds_needed(g, deviation, above=0.0) or 9999) <= seeds)


def test_exercise_2():
    check_2(smallest_gain)
    with pytest.raises(AssertionError, match="half of the time"):
        check_2(lambda deviation, seeds: over_seeds([-deviation, 0, deviation]).half_width())
    with pytest.raises(AssertionError, match="10 %"):
        check_2(lambda deviation, seeds: deviation)


def fieller(part, whole):
    contrasts = {i / 100: share_contrast(part, whole, i / 100) for i in range(201)}
    kept = [share for share, contrast in contrasts.items() if contrast.low <= 0 <= contrast.high]
    return kept[0], kept[-1]


def test_exercise_3():
    check_3(fieller)
    with pytest.raises(AssertionError, match="least share first"):
        check_3(lambda part, whole: fieller(part, whole)[::-1])
    with pytest.raises(AssertionError, match="contain 0"):
        check_3(lambda part, whole: (0.2, 0.8))


ONE = {"l3_after_layers": "2", "l3_n_emb": 8192}
TWO = {"l3_after_layers": "1,2", "l3_n_emb": 4096, "l3_d_up": 128}


def test_exercise_4():
    check_4({"one table": ONE, "two tables": TWO})


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"lr_scale": 2.0}, "leave everything else"),
        ({"l3_after_layers": "1"}, "how many"),
        ({"l3_n_emb": 8192}, "totals"),
        ({"l3_after_layers": "2,3"}, "outer place"),
        ({"l3_d_up": 256}, "FLOPs"),
    ],
)
def test_wrong_answers_to_exercise_4(changes, hint):
    with pytest.raises(AssertionError, match=hint):
        check_4({"one table": ONE, "two tables": TWO | changes})


MODEL = GPTConfig(1024, 50_304, n_layer=24, n_head=16, n_kv_head=16, n_embd=1024)
LAYER = {"l3_after_layers": "11", "l3_n_emb": 19 * 50_304, "l3_k_max": 512}
HALVES = {"l3_after_layers": "7,15", "l3_n_emb": 9 * 50_304, "l3_k_max": 256, "l3_d_up": 1024}


@pytest.mark.parametrize("answer", [LAYER, HALVES])
def test_exercise_5(answer):
    check_5(answer, MODEL)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"l3_after_layers": ""}, "no block"),
        ({"n_layer": 12}, "must stay"),
        ({"l3_after_layers": "1"}, "time to arrive"),
        ({"l3_after_layers": "23"}, "behind|follow"),
        ({"l3_k_max": 1024}, "moves"),
        ({"l3_n_emb": 30 * 50_304}, "tables take"),
        ({"l3_d_up": 8192}, "more FLOPs"),
        ({"l3_n_emb": 4 * 50_304}, "room for more"),
    ],
)
def test_wrong_answers_to_exercise_5(changes, hint):
    with pytest.raises(AssertionError, match=hint):
        check_5(LAYER | changes, MODEL)


def test_drawings():
    gain, other = over_seeds([0.01, 0.02, 0.04]), over_seeds([-0.01, 0.0, 0.02])
    fig = draw.forest("settings", {"cap": {"8": gain, "16": other}, "place": {"0": gain}}, "nats")
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert labels == ["8", "16", "0"]
    assert [text.get_text() for text in fig.axes[0].texts] == ["cap", "place"]
    fig = draw.rows_and_width("rows", {32: {4: gain}, 64: {1: other, 4: gain}})
    assert len(fig.axes[0].containers) == 2
    fig = draw.two_dials({"inference": {1: 0.5, 2: 1.0}}, {"4 C": (2.0, 0.1)})
    assert len(fig.axes) == 2
    plt.close("all")
