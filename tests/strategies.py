"""Hypothesis strategies shared by the tests of allocation, lookups and the layer."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from l3paper.allocation import allocation_to_bounds


@st.composite
def corpora(draw, max_vocab: int = 12):
    """(vocab_size, documents): up to six documents of ids, some of them empty."""
    vocab_size = draw(st.integers(1, max_vocab))
    document = st_numpy.arrays(np.int64, st.integers(0, 60), elements=st.integers(0, vocab_size - 1))
    return vocab_size, draw(st.lists(document, max_size=6))


@st.composite
def lookup_inputs(draw, tied: bool, max_rows: int = 9):
    """Arguments of a lookup in float64, ready for gradients, on a random ragged allocation."""
    alloc = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=8))
    positions = draw(st.integers(0, 40))
    d_in, d_emb = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    return make_inputs(alloc, positions, d_in, d_in if tied else d_emb, tied, seed)


def make_inputs(alloc, positions, d_in, d_emb, tied, seed):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    token_ids = torch.randint(len(alloc), (positions,), generator=random)
    keys = normal(sum(alloc), d_in)
    values = keys if tied else normal(sum(alloc), d_emb)
    return normal(positions, d_in), token_ids, allocation_to_bounds(alloc), keys, values
