"""Checkers of notebook 01."""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from l3paper.allocation import Codebook, allocate_by_codewords, count_phrases
from l3paper.costs.accounting import weighted_mean_rows


def check_1(answer: Sequence[float]) -> None:
    assert len(answer) == 3, "one weight for each of the three contexts: a list of three numbers"
    assert np.allclose(answer, 1), "apply the softmax to the scores of this token's rows: how many?"


def check_2(answer: Mapping[str, int]) -> None:
    counts = count_phrases([["ab".index(token) for token in "aaaaaaabaa"]], vocab_size=2)
    right = {"".join("ab"[t] for t in phrase): n for phrase, n in counts.items() if n}
    extra, missing = answer.keys() - right.keys(), right.keys() - answer.keys()
    assert not extra, f"the scan does not count {min(extra)!r}: cut the document into pieces again"
    assert not missing, f"{len(missing)} phrases are missing: write down what enters, and what counts"
    wrong = [phrase for phrase in right if answer[phrase] != right[phrase]]
    assert not wrong, (
        f"not the count of {wrong[0]!r}: entering counts as 1, and so does the document's end"
    )


def check_3(answer: Callable) -> None:
    draw = random.Random(0)
    documents = [draw.choices(range(4), (6, 3, 2, 1), k=length) for length in (0, 1, 5, 40, 40)]
    given = answer(documents, range(4))
    assert given is not None, "return the dictionary of counts"
    assert given != count_phrases(documents, 4), "this is the LZ78 parse: it restarts behind the token"
    right = count_phrases(documents, 4, restart_at_mismatch=True)
    assert given.keys() == right.keys(), "other phrases than those of textbook LZW entered"
    assert given == right, "the right phrases, but not their counts; look at the ends of documents"


def check_4(answer: Mapping[str, str]) -> None:
    right = {"A": "shown", "B": "not measured", "C": "contradicted", "D": "shown"}
    assert answer.keys() == right.keys(), "answer the four claims A, B, C and D"
    unknown = set(answer.values()) - set(right.values())
    assert not unknown, f"{unknown} is not one of {sorted(set(right.values()))}"
    wrong = [claim for claim in right if answer[claim] != right[claim]]
    assert not wrong, f"claim {wrong[0]}: which output would have to show it, and what does it say?"


def check_5(answer: int, codebook: Codebook, n_emb: int = 65_536, budget: float = 100) -> None:
    def mean(k_max: int) -> float:
        return weighted_mean_rows(allocate_by_codewords(codebook, n_emb, k_max), codebook.token_counts)

    assert mean(answer) <= budget, f"above the budget: over {budget} rows per position on average"
    assert mean(answer + 1) > budget, "within the budget, but a larger cap would be, too"
