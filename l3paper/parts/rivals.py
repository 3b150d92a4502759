"""Layers that can stand in the place of an L3 layer, to be compared with it at equal cost.

code                   after                       context comes from
----                   -----                       ------------------
ExtraMLP               a block's own MLP           the residual stream alone
PerLayerEmbedding      Gemma 3n, STEM              the residual stream, beside the token's one row
Engram                 arXiv:2601.07372            the last two and three tokens, hashed

Each returns the delta that the model adds to the residual stream, as `L3Layer` does, and starts as a
layer that adds nothing. `l3paper.costs.equal` chooses their sizes.
"""

import random
from collections.abc import Callable
from functools import cache
from itertools import count, islice
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.errors import at_least
from l3paper.layer import rms_norm
from l3paper.parts.cache import History

HEADS = 4
"""Hash functions, and so rows, per n-gram length in an Engram layer."""

N_GRAMS = (2, 3)

TABLES = HEADS * len(N_GRAMS)
"""Tables of an Engram layer, and rows that a position reads."""

KERNEL = 4
"""Positions that the convolution of an Engram layer sums over; they are max(N_GRAMS) apart."""


class Rival(nn.Module):
    """A layer of matrices and at most one table. Subclasses define `forward(x, token_ids, history)`.

    x is (B, T, n_embd), token_ids (B, T). `history` is None unless tokens are decoded one after the
    other: then it holds what an Engram layer needs of the earlier ones.
    """

    def tables(self) -> list[Tensor]:
        """The parameter `table` of the layers that have one."""
        return [self.table] if hasattr(self, "table") else []

    def projections(self) -> list[nn.Linear]:
        """The layer's matrices beside its table."""
        return [module for module in self.children() if isinstance(module, nn.Linear)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter again; the projection into the stream, the last, starts at zero."""
        for table in self.tables():
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator)
        *inner, outer = self.projections()
        for linear in inner:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(outer.weight)


class ExtraMLP(Rival):
    """One more MLP, as in a block: W_proj relu(W_fc Norm(x))^2. It has no table.

    Args:
        n_embd: width of the residual stream.
        d_up: hidden width.
    """

    def __init__(self, n_embd: int, d_up: int):
        super().__init__()
        at_least(1, n_embd=n_embd, d_up=d_up)
        self.c_fc = nn.Linear(n_embd, d_up, bias=False)
        self.c_proj = nn.Linear(d_up, n_embd, bias=False)
        self.reset_parameters()

    def forward(self, x: Tensor, token_ids: Tensor, history: History | None = None) -> Tensor:
        return self.c_proj(self.c_fc(rms_norm(x)).relu().square())  # (B, T, n_embd)


class PerLayerEmbedding(Rival):
    """One row per token, projected and mixed as in an L3 layer: W_mix [Norm(W_up e_t) ; x].

    It is an L3 layer whose tokens all own one row. A softmax over one row is 1, so there are no keys,
    and the row may have any width.

    Args:
        n_embd: width of the residual stream.
        vocab_size: rows of the table.
        d_emb: width of a row.
        d_up: width after the up-projection.
    """

    def __init__(self, n_embd: int, vocab_size: int, d_emb: int, d_up: int):
        super().__init__()
        at_least(1, n_embd=n_embd, vocab_size=vocab_size, d_emb=d_emb, d_up=d_up)
        self.table = nn.Parameter(torch.empty(vocab_size, d_emb))
        self.w_up = nn.Linear(d_emb, d_up, bias=False)
        self.w_mix = nn.Linear(d_up + n_embd, n_embd, bias=False)
        self.reset_parameters()

    def forward(self, x: Tensor, token_ids: Tensor, history: History | None = None) -> Tensor:
        up = rms_norm(self.w_up(F.embedding(token_ids, self.table)))  # (B, T, d_up)
        return self.w_mix(torch.cat([up, x], dim=-1))  # (B, T, n_embd)


class Engram(Rival):
    """Hashed n-gram memory (Engram, arXiv:2601.07372, section 2).

        e = rows of the 2-gram and the 3-gram that end here, HEADS hashes each, concatenated
        v = sigmoid(Norm(x) . Norm(W_k e) / sqrt(n_embd)) W_v e
        delta = v + SiLU(conv(Norm(v)))

    The convolution is causal and depthwise; its weights start at zero, and so does W_v. It differs from
    the paper's layer in two ways: token ids are not merged to canonical ones first, and norms carry no
    gains, as everywhere in this model.

    Args:
        n_embd: width of the residual stream.
        rows: rows of all TABLES tables together; `table_sizes` gives each a prime number of them.
        d_emb: width of a row.
    """

    def __init__(self, n_embd: int, rows: int, d_emb: int):
        super().__init__()
        at_least(1, n_embd=n_embd, d_emb=d_emb)
        self.rows = rows
        self.register_buffer("sizes", None, persistent=False)  # (len(N_GRAMS), HEADS)
        self.register_buffer("starts", None, persistent=False)
        self.table = nn.Parameter(torch.empty(sum(table_sizes(rows)), d_emb))
        self.w_k = nn.Linear(TABLES * d_emb, n_embd, bias=False)
        self.w_v = nn.Linear(TABLES * d_emb, n_embd, bias=False)
        self.convolution = nn.Parameter(torch.empty(KERNEL, n_embd))
        self.set_places(self.table.device)
        self.reset_parameters()

    def set_places(self, device: torch.device) -> None:
        """Compute where each table lies in `table`, which is not part of a state dict."""
        sizes = torch.tensor(table_sizes(self.rows))
        starts = sizes.cumsum(0) - sizes
        self.sizes, self.starts = (x.view(-1, HEADS).to(device) for x in (sizes, starts))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.zeros_(self.convolution)

    def forward(self, x: Tensor, token_ids: Tensor, history: History | None = None) -> Tensor:
        token_before = _before(token_ids, -1) if history is None else history.add("ids", token_ids)
        rows = self.row_numbers([token_before(n) for n in range(max(N_GRAMS))])  # (B, T, TABLES)
        e = F.embedding(rows, self.table).flatten(-2)  # (B, T, TABLES * d_emb)
        agreement = (rms_norm(x) * rms_norm(self.w_k(e))).sum(dim=-1, keepdim=True)  # (B, T, 1)
        v = torch.sigmoid(agreement * x.shape[-1] ** -0.5) * self.w_v(e)  # (B, T, n_embd)
        normed = rms_norm(v)
        value_before = _before(normed, 0) if history is None else history.add("values", normed)
        summed = sum(w * value_before(max(N_GRAMS) * i) for i, w in enumerate(self.convolution))
        return v + F.silu(summed)

    def row_numbers(self, ids: list[Tensor]) -> Tensor:
        """The rows (..., TABLES) to read, of ids (...) here, one token before, two before, ...

        An id is -1 before the beginning. Ids are multiplied by odd numbers, combined by XOR, and taken
        modulo the size of each table (arXiv:2601.07372, section 2.2).
        """
        rows = []
        for n, sizes, starts in zip(N_GRAMS, self.sizes, self.starts, strict=True):
            mixed = torch.zeros_like(ids[0])
            for token, multiplier in zip(ids[:n], MULTIPLIERS, strict=False):
                mixed = mixed ^ (token + 1) * multiplier
            rows.append(starts + mixed[..., None] % sizes)
        return torch.cat(rows, dim=-1)


MULTIPLIERS = [random.Random(n).randrange(1, 2**31, 2) for n in range(max(N_GRAMS))]
"""Below 2^31, so that their products with ids stay below 2^62."""


@cache
def table_sizes(rows: int) -> tuple[int, ...]:
    """The sizes of an Engram layer's tables: the TABLES primes that are nearest to rows / TABLES.

    Different primes make the hash functions different. Raises ValueError for fewer than 100 rows.
    """
    at_least(100, rows=rows)
    middle = round(rows / TABLES)
    outwards = (middle + sign * step for step in count() for sign in (-1, 1)[: 1 + bool(step)])
    return tuple(sorted(islice(filter(_is_prime, outwards), TABLES)))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _before(new: Tensor, fill: float) -> Callable[[int], Tensor]:
    """A function from an offset to the entries of `new` (B, T, ...) that many positions earlier."""
    time, untouched = new.shape[1], (0, 0) * (new.ndim - 2)
    return lambda offset: F.pad(new, (*untouched, offset, 0), value=fill)[:, :time]


RIVALS = {"mlp": ExtraMLP, "per-layer-embedding": PerLayerEmbedding, "engram": Engram}
"""Rivals by the name that configurations use."""
