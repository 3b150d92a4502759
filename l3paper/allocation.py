"""How many rows each token owns: the LZW scan of the corpus (paper, Algorithm 1).

A row of the table can serve one short context of its token. The scan finds the phrases
("codewords") that the corpus repeats most; each gives a row to the token it ends in. So a token
that ends many frequent phrases owns many rows, and a token that ends few owns one.

    documents -> codewords -> rows per token (d_t) -> bounds

`count_phrases` and `give_rows` are Algorithm 1 as one would write it first, and the specification.
`scan_codewords` counts the same phrases faster.

code         paper  meaning
----         -----  -------
vocab_size   |V|    number of tokens
n_emb        v      number of rows, of all tokens together
k_max        k      the most rows that one token may own
alloc[t]     d_t    number of rows that token t owns
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import numpy as np
import torch

from l3paper.errors import at_least

Documents = Iterable[Sequence[int]]
"""The token ids of every document."""


def count_phrases(
    documents: Documents,
    vocab_size: int,
    *,
    restart_at_mismatch: bool = False,
    reset_at_document_end: bool = False,
) -> dict[tuple[int, ...], int]:
    """The first half of Algorithm 1: how often the greedy parse of the documents emits each phrase.

    From the current start the phrase grows while the dictionary knows it. At the first unknown
    phrase, the known part counts once more, the unknown phrase enters with count 1, and the parse
    restarts behind it. A document that ends inside a known phrase counts that phrase once more.

    restart_at_mismatch: restart AT the mismatching token, as textbook LZW does. The paper's published
        listing restarts behind it, which is the LZ78 parse.
    reset_at_document_end: set the count of the phrase that a document ends in to 1, as the published
        listing does, whatever it was before.
    """
    counts = {(token,): 0 for token in range(vocab_size)}
    for document in documents:
        phrase = ()
        for token in document:
            longer = (*phrase, token)
            if longer in counts:
                phrase = longer
            else:
                counts[phrase] += 1
                counts[longer] = 1
                phrase = (token,) if restart_at_mismatch else ()
        if phrase:
            counts[phrase] = 1 if reset_at_document_end else counts[phrase] + 1
    return counts


def give_rows(last_tokens: Iterable[int], vocab_size: int, n_emb: int, k_max: int) -> list[int]:
    """The second half of Algorithm 1: rows per token, `vocab_size` integers in 1 .. k_max.

    `last_tokens` are the last tokens of the counted phrases, by descending count; ties in order of
    creation. Every token owns one row. Each phrase gives its last token one more, unless that owns
    k_max, until n_emb rows are given or the phrases have run out.
    """
    alloc = [1] * vocab_size
    left = n_emb - vocab_size
    for token in last_tokens:
        if not left:
            break
        if alloc[token] < k_max:
            alloc[token] += 1
            left -= 1
    return alloc


ROOT = -1
"""The node of the empty phrase."""


@dataclass(frozen=True)
class Codebook:
    """The dictionary that a scan leaves behind: a trie whose nodes are numbered in order of creation.

    Nodes 0 .. vocab_size - 1 are the single tokens.
    """

    vocab_size: int
    parents: np.ndarray  # (nodes,) the node that each node extends
    tokens: np.ndarray  # (nodes,) the token that it extends it by
    counts: np.ndarray  # (nodes,) how often its phrase counts, as in `count_phrases`
    token_counts: np.ndarray  # (vocab_size,) how often each token occurs in the corpus

    def phrase(self, node: int) -> tuple[int, ...]:
        """The token ids on the way from the root to `node`."""
        reverse = []
        while node != ROOT:
            reverse.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tuple(reversed(reverse))

    def ranked_nodes(self) -> np.ndarray:
        """Nodes with a count above 0, by descending count; ties in order of creation."""
        order = np.argsort(-self.counts, kind="stable")
        return order[: np.count_nonzero(self.counts)]

    def codewords(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """The codewords as (phrase, count), in the order in which they give rows."""
        for node in self.ranked_nodes():
            yield self.phrase(node), int(self.counts[node])


def scan_codewords(
    token_sequences: Documents,
    vocab_size: int,
    *,
    restart_at_mismatch: bool = False,
    reset_at_document_end: bool = False,
) -> Codebook:
    """Scan every document once: `count_phrases`, with a trie of integers in place of tuples.

    Raises ValueError for a vocab_size below 1 and for ids that are not integers in 0 .. vocab_size - 1.
    """
    _require_integers(vocab_size=vocab_size)
    # children[token][node] is the node that extends `node` by `token`. Small integers keep the
    # dictionaries small, and setdefault finds a phrase, or enters it, in one step.
    children: list[dict[int, int]] = [{ROOT: token} for token in range(vocab_size)]
    parents, tokens, counts = [ROOT] * vocab_size, list(range(vocab_size)), [0] * vocab_size
    token_counts = np.zeros(vocab_size, np.int64)
    for ids in _checked(token_sequences, vocab_size):
        token_counts += np.bincount(ids, minlength=vocab_size)
        node = ROOT
        for token in ids.tolist():
            new = len(counts)
            child = children[token].setdefault(node, new)
            if child != new:
                node = child
                continue
            counts[node] += 1
            counts.append(1)
            parents.append(node)
            tokens.append(token)
            node = token if restart_at_mismatch else ROOT
        if node != ROOT:
            counts[node] = 1 if reset_at_document_end else counts[node] + 1
    arrays = (np.array(numbers, np.int64) for numbers in (parents, tokens, counts))
    return Codebook(vocab_size, *arrays, token_counts)


def compute_lzw_allocation(
    token_sequences: Documents,
    vocab_size: int,
    n_emb: int,
    k_max: int,
    *,
    restart_at_mismatch: bool = False,
    reset_at_document_end: bool = False,
) -> list[int]:
    """Rows per token by Algorithm 1 of the paper: a list of `vocab_size` integers in 1 .. k_max.

    Their sum is min(n_emb, vocab_size * k_max), with a warning where the cap keeps it below n_emb, and
    another where the corpus runs out of codewords; the other rows are then given by token frequency.
    The options are those of `count_phrases`.

    Raises ValueError for n_emb < vocab_size, k_max < 1, sizes that are not integers, and bad ids.
    """
    _require_sizes(vocab_size, n_emb, k_max)
    codebook = scan_codewords(
        token_sequences,
        vocab_size,
        restart_at_mismatch=restart_at_mismatch,
        reset_at_document_end=reset_at_document_end,
    )
    return allocate_by_codewords(codebook, n_emb, k_max)


def allocate_by_codewords(codebook: Codebook, n_emb: int, k_max: int) -> list[int]:
    """`give_rows` from a finished scan; the rows that no codeword gives go by token frequency."""
    vocab_size = codebook.vocab_size
    total = _total_rows(vocab_size, n_emb, k_max)
    last_tokens = codebook.tokens[codebook.ranked_nodes()].tolist()
    alloc = np.array(give_rows(last_tokens, vocab_size, total, k_max))
    if missing := total - int(alloc.sum()):
        warnings.warn(
            f"the corpus has {alloc.sum() - vocab_size} usable codewords for {total - vocab_size} rows "
            f"beyond one per token; the other {missing} rows are given by token frequency",
            stacklevel=2,
        )
        _fill(alloc, missing, codebook.token_counts, k_max)
    return alloc.tolist()


def compute_frequency_allocation(
    token_sequences: Documents, vocab_size: int, n_emb: int, k_max: int
) -> list[int]:
    """Rows in proportion to token frequency, 1 to k_max each; otherwise as compute_lzw_allocation."""
    total = _total_rows(vocab_size, n_emb, k_max)
    alloc = np.ones(vocab_size, np.int64)
    _fill(alloc, total - vocab_size, _token_counts(token_sequences, vocab_size), k_max)
    return alloc.tolist()


def compute_uniform_allocation(
    token_sequences: Documents, vocab_size: int, n_emb: int, k_max: int
) -> list[int]:
    """The same number of rows for every token; those left over go to the most frequent, one each."""
    total = _total_rows(vocab_size, n_emb, k_max)
    alloc = np.full(vocab_size, total // vocab_size)
    frequency = _token_counts(token_sequences, vocab_size)
    alloc[np.argsort(-frequency, kind="stable")[: total % vocab_size]] += 1
    return alloc.tolist()


ALLOCATIONS: dict[str, Callable[[Documents, int, int, int], list[int]]] = {
    "lzw": compute_lzw_allocation,
    "lzw-textbook": partial(compute_lzw_allocation, restart_at_mismatch=True),
    "lzw-listing": partial(compute_lzw_allocation, reset_at_document_end=True),
    "frequency": compute_frequency_allocation,
    "uniform": compute_uniform_allocation,
}


def allocation_to_bounds(alloc: Sequence[int]) -> torch.Tensor:
    """Running sums, a LongTensor (vocab_size + 1,): token t owns rows bounds[t] : bounds[t + 1].

    Raises ValueError for an empty allocation and for a token with less than one row.
    """
    rows = np.asarray(alloc)
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu" or rows.min() < 1:
        raise ValueError(
            f"the rows per token are {alloc!r:.60}; they must be integers, each at least 1"
        )
    return torch.from_numpy(np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))


def _fill(alloc: np.ndarray, rows: int, frequency: np.ndarray, k_max: int) -> None:
    """Give `rows` more rows to `alloc` in place, in proportion to frequency, none above k_max.

    A more frequent token gets at least as many as a rarer one, unless the cap stops it. Rows left over
    among equally frequent tokens go in the order of ids. Tokens that never occur get rows, evenly, only
    when all others are full.
    """
    while rows:
        free = np.flatnonzero(alloc < k_max)
        weights = frequency[free]
        if not weights.any():
            weights = np.ones(len(free), np.int64)
        shares = rows * weights // weights.sum()
        if not shares.any():  # fewer rows than takers: one each, the most frequent first
            shares[np.argsort(-weights, kind="stable")[:rows]] = 1
        shares = np.minimum(shares, k_max - alloc[free])
        alloc[free] += shares
        rows -= int(shares.sum())


def _token_counts(token_sequences: Documents, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for ids in _checked(token_sequences, vocab_size):
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def _checked(token_sequences: Documents, vocab_size: int) -> Iterator[np.ndarray]:
    """Each document as an int64 array; ValueError for one that does not hold ids of the vocabulary."""
    for number, sequence in enumerate(token_sequences):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"token_sequences[{number}] must be a sequence of integer token ids")
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(
                f"token_sequences[{number}] holds id {wrong}, outside 0 .. {vocab_size - 1}"
            )
        yield ids.astype(np.int64)


def _total_rows(vocab_size: int, n_emb: int, k_max: int) -> int:
    """How many rows can be given: n_emb or, with a warning, fewer if k_max caps every token."""
    _require_sizes(vocab_size, n_emb, k_max)
    total = min(n_emb, vocab_size * k_max)
    if total < n_emb:
        warnings.warn(
            f"k_max = {k_max} caps {vocab_size} tokens at {total} rows in all, below n_emb = {n_emb}",
            stacklevel=3,
        )
    return total


def _require_sizes(vocab_size: int, n_emb: int, k_max: int) -> None:
    _require_integers(vocab_size=vocab_size, n_emb=n_emb, k_max=k_max)
    if n_emb < vocab_size:
        raise ValueError(
            f"n_emb is {n_emb}, but each of the {vocab_size} tokens needs a row: at least {vocab_size}"
        )


def _require_integers(**arguments: int) -> None:
    """Raise ValueError for the first argument that is not an integer of at least 1."""
    for name, value in arguments.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} is {value!r}; it must be an integer")
        at_least(1, **{name: value})
