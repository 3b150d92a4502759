"""The checkers and drawings of notebook 01."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from l3paper.allocation import allocate_by_codewords, count_phrases, scan_codewords
from l3paper.costs.accounting import weighted_mean_rows
from l3paper.notebooks.drawings import allocation as draw
from l3paper.notebooks.exercises import allocation as checkers

BY_HAND = {"a": 1, "aa": 4, "aaa": 1, "aab": 1}
JUDGED = {"A": "shown", "B": "not measured", "C": "contradicted", "D": "shown"}


def textbook(documents, vocabulary):
    return count_phrases(documents, len(vocabulary), restart_at_mismatch=True)


def published(documents, vocabulary):
    return count_phrases(documents, len(vocabulary))


def doubled(documents, vocabulary):
    return {phrase: 2 * count for phrase, count in textbook(documents, vocabulary).items()}


def singles(documents, vocabulary):
    return {(token,): 0 for token in vocabulary}


@pytest.mark.parametrize(
    ("checker", "right"),
    [
        (checkers.check_1, [1, 1, 1]),
        (checkers.check_2, BY_HAND),
        (checkers.check_3, textbook),
        (checkers.check_4, JUDGED),
    ],
)
def test_right_answers_pass(checker, right):
    checker(right)


@pytest.mark.parametrize(
    ("checker", "wrong", "hint"),
    [
        (checkers.check_1, [1, 1], "three numbers"),
        (checkers.check_1, [0.3, 0.3, 0.4], "this token's rows"),
        (checkers.check_2, BY_HAND | {"b": 1}, "does not count 'b'"),
        (checkers.check_2, {"aa": 4}, "3 phrases are missing"),
        (checkers.check_2, BY_HAND | {"aa": 3}, "the count of 'aa'"),
        (checkers.check_3, lambda documents, vocabulary: None, "return"),
        (checkers.check_3, published, "LZ78"),
        (checkers.check_3, singles, "other phrases"),
        (checkers.check_3, doubled, "not their counts"),
        (checkers.check_4, {"A": "shown"}, "four claims"),
        (checkers.check_4, JUDGED | {"A": "yes"}, "'yes'"),
        (checkers.check_4, JUDGED | {"B": "shown"}, "claim B"),
    ],
)
def test_wrong_answers_get_a_hint(checker, wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        checker(wrong)


def test_the_cap_within_a_budget():
    text = np.random.default_rng(0).zipf(1.3, 20_000) % 500
    codebook = scan_codewords([text], vocab_size=500)
    budget = weighted_mean_rows(allocate_by_codewords(codebook, 3000, 40), codebook.token_counts)
    checkers.check_5(40, codebook, n_emb=3000, budget=budget)
    with pytest.raises(AssertionError, match="above the budget"):
        checkers.check_5(41, codebook, n_emb=3000, budget=budget)
    with pytest.raises(AssertionError, match="a larger cap"):
        checkers.check_5(39, codebook, n_emb=3000, budget=budget)


def test_the_animation_ends_with_algorithm_1():
    documents = [list("aab"), list("aba")]
    *_, (_, counts, _) = draw._scan(documents, "ab")
    ids = [["ab".index(token) for token in document] for document in documents]
    expected = count_phrases(ids, 2)
    assert list(counts.values()) == list(expected.values())
    frames = list(draw.scan_frames(documents, "ab", n_emb=4, k_max=2))
    plt.close("all")
    pieces, walked, rest = 4, 2, 2
    assert len(frames) == pieces + walked + rest
