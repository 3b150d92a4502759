"""The LZW scan against Algorithm 1 as one would write it, and what every allocation guarantees."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import corpora
from l3paper.allocation import (
    allocate_by_codewords,
    allocation_to_bounds,
    compute_frequency_allocation,
    compute_lzw_allocation,
    compute_uniform_allocation,
    count_phrases,
    give_rows,
    scan_codewords,
)

ALLOCATIONS = [compute_lzw_allocation, compute_frequency_allocation, compute_uniform_allocation]


def ranked(counts):
    """Phrases and counts above 0, by descending count; ties in order of creation."""
    return [item for item in sorted(counts.items(), key=lambda item: -item[1]) if item[1]]


@given(corpora(), st.booleans(), st.booleans())
def test_scan_equals_algorithm_1_as_one_would_write_it(corpus, restart, reset):
    vocab_size, documents = corpus
    options = dict(restart_at_mismatch=restart, reset_at_document_end=reset)
    codebook = scan_codewords(documents, vocab_size, **options)
    expected = ranked(count_phrases(documents, vocab_size, **options))
    assert list(codebook.codewords()) == expected


@given(corpora())
def test_scan_counts_tokens(corpus):
    vocab_size, documents = corpus
    counts = Counter(token for document in documents for token in document.tolist())
    codebook = scan_codewords(documents, vocab_size)
    assert codebook.token_counts.tolist() == [counts[token] for token in range(vocab_size)]


def test_published_parse_by_hand():
    # 0 1 | 0 1 0 | 1: "0 1" enters, then "0 1 0", and the document ends inside the known "1".
    codebook = scan_codewords([[0, 1, 0, 1, 0, 1]], 2)
    expected = [((0, 1), 2), ((0,), 1), ((1,), 1), ((0, 1, 0), 1)]
    assert list(codebook.codewords()) == expected


@pytest.mark.parametrize("restart", [True, False])
def test_only_textbook_lzw_restarts_at_the_mismatch(restart):
    # Textbook: "0 1" enters, the parse restarts at 1, and "1 0" enters.
    codebook = scan_codewords([[0, 1, 0, 1, 0]], 2, restart_at_mismatch=restart)
    assert ((1, 0) in dict(codebook.codewords())) == restart


def test_document_end_never_lowers_a_count_by_default():
    documents = [[0, 1, 2]] * 5 + [[0]]
    counted = dict(scan_codewords(documents, 3).codewords())
    reset = dict(scan_codewords(documents, 3, reset_at_document_end=True).codewords())
    assert counted[(0,)] == 2
    assert reset[(0,)] == 1


@pytest.mark.parametrize("compute", ALLOCATIONS)
@given(corpus=corpora(), extra=st.integers(0, 80), k_max=st.integers(1, 12))
def test_every_allocation_is_whole_bounded_and_exact(compute, corpus, extra, k_max):
    vocab_size, documents = corpus
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alloc = compute(documents, vocab_size, vocab_size + extra, k_max)
    assert len(alloc) == vocab_size
    assert all(type(rows) is int and 1 <= rows <= k_max for rows in alloc)
    assert sum(alloc) == min(vocab_size + extra, vocab_size * k_max)
    capped = vocab_size + extra > vocab_size * k_max
    assert any("caps" in str(warning.message) for warning in caught) == capped


@given(corpora(), st.integers(0, 80), st.integers(1, 12))
def test_lzw_walk_then_filler(corpus, extra, k_max):
    vocab_size, documents = corpus
    n_emb = min(vocab_size + extra, vocab_size * k_max)
    codebook = scan_codewords(documents, vocab_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alloc = np.array(compute_lzw_allocation(documents, vocab_size, n_emb, k_max))
    last_tokens = (phrase[-1] for phrase, _ in ranked(count_phrases(documents, vocab_size)))
    walked = np.array(give_rows(last_tokens, vocab_size, n_emb, k_max))
    filled = alloc - walked
    assert (filled >= 0).all()
    assert bool(caught) == bool(filled.any())
    for a in range(vocab_size):
        for b in range(vocab_size):
            if codebook.token_counts[a] > codebook.token_counts[b]:
                assert filled[a] >= filled[b] or alloc[a] == k_max


@given(corpora(), st.integers(0, 80), st.integers(1, 12))
def test_frequency_allocation_never_prefers_the_rarer(corpus, extra, k_max):
    vocab_size, documents = corpus
    counts = scan_codewords(documents, vocab_size).token_counts
    n_emb = min(vocab_size + extra, vocab_size * k_max)
    alloc = compute_frequency_allocation(documents, vocab_size, n_emb, k_max)
    for a in range(vocab_size):
        assert all(alloc[a] >= alloc[b] for b in range(vocab_size) if counts[a] > counts[b])


@pytest.mark.filterwarnings("ignore:the corpus has")
def test_frequent_tokens_own_more_rows_than_rare_ones():
    stream = [3] * 200 + [1] * 20 + [0, 2, 4, 5]
    alloc = compute_lzw_allocation([stream], vocab_size=6, n_emb=48, k_max=24)
    assert alloc[3] > alloc[1] > max(alloc[token] for token in (0, 2, 4, 5))


@pytest.mark.parametrize("compute", ALLOCATIONS)
def test_as_many_rows_as_tokens_means_one_each(compute):
    assert compute([[0, 1, 2, 3, 1]], vocab_size=4, n_emb=4, k_max=7) == [1, 1, 1, 1]


def test_filler_ignores_token_ids():
    # The frequent token has the highest id; a filler by id would hand its rows to token 0.
    with pytest.warns(UserWarning, match="runs out|usable codewords"):
        alloc = compute_lzw_allocation([[7] * 30], vocab_size=8, n_emb=40, k_max=30)
    assert alloc[7] == 30
    assert max(alloc[:7]) - min(alloc[:7]) <= 1


def test_uniform_is_uniform():
    assert compute_uniform_allocation([[2, 2, 1]], 3, 11, 9) == [3, 4, 4]


def test_result_depends_on_arguments_alone():
    documents = [np.random.default_rng(0).integers(0, 50, 400) for _ in range(5)]
    kinds = [documents, [d.tolist() for d in documents], [torch.from_numpy(d) for d in documents]]
    results = [compute_lzw_allocation(kind, 50, 120, 9) for kind in kinds for _ in range(2)]
    assert all(result == results[0] for result in results)
    assert compute_lzw_allocation(iter(documents), 50, 120, 9) == results[0]


@pytest.mark.parametrize("compute", ALLOCATIONS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0]], 4, 3, 2), "n_emb is 3"),
        (([[0]], 4, 8, 0), "k_max is 0"),
        (([[0]], 0, 8, 1), "vocab_size is 0"),
        (([[0]], 4, 8.5, 2), "n_emb is 8.5"),
        (([[0]], 4, 8, "2"), "k_max is '2'"),
        (([[0], [4]], 4, 8, 2), r"token_sequences\[1\] holds id 4, outside 0 .. 3"),
        (([[-1]], 4, 8, 2), "holds id -1"),
        (([[0.5]], 4, 8, 2), r"token_sequences\[0\] must be a sequence of integer token ids"),
        (([[True]], 4, 8, 2), "must be a sequence of integer token ids"),
        (([0, 1, 2], 4, 8, 2), "must be a sequence of integer token ids"),
        (([[[0, 1]]], 4, 8, 2), "must be a sequence of integer token ids"),
    ],
)
def test_bad_arguments(compute, arguments, message):
    with pytest.raises(ValueError, match=message):
        compute(*arguments)


def test_bounds_are_running_sums():
    bounds = allocation_to_bounds([2, 5, 1])
    assert bounds.dtype == torch.long
    assert bounds.tolist() == [0, 2, 7, 8]


@pytest.mark.parametrize("alloc", [[], [1, 0, 2], [[1], [2]], [1.0, 2.0], ["1"]])
def test_bounds_of_nonsense(alloc):
    with pytest.raises(ValueError, match="they must be integers, each at least 1"):
        allocation_to_bounds(alloc)


@pytest.mark.slow
def test_scan_of_the_default_corpus_equals_algorithm_1(corpus):
    documents = corpus.documents()
    codebook = scan_codewords(documents, corpus.vocab_size)
    expected = ranked(count_phrases([document.tolist() for document in documents], corpus.vocab_size))
    assert list(codebook.codewords()) == expected


@pytest.mark.slow
def test_codebook_can_be_shared_between_sizes(corpus):
    codebook = scan_codewords(corpus.documents(), corpus.vocab_size)
    small, large = (allocate_by_codewords(codebook, n, 512) for n in (8192, 65536))
    assert (sum(small), sum(large)) == (8192, 65536)
    assert all(a <= b for a, b in zip(small, large, strict=True))
    assert large == compute_lzw_allocation(corpus.documents(), corpus.vocab_size, 65536, 512)
