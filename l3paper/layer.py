"""The L3 layer: a lookup into the token's own rows, mixed with the residual stream (paper, section 3).

code            paper        meaning
----            -----        -------
n_embd          d_in, d_out  width of the residual stream
n_emb           v            rows of the table, all tokens together
d_emb           d_emb        width of a value row
d_up            d_up         width after the up-projection
w_up, w_mix     W_up, W_mix  the two projections
x               x            the residual stream; rms_norm(x) is x̂
look_up         -            V_t^T softmax(K_t x̂), in `l3paper.lookup.table` with W_K and W_V
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.errors import at_least
from l3paper.lookup import Lookup, Plan
from l3paper.lookup.table import RowTable
from l3paper.parts.device import autocasts


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without gains."""
    return F.rms_norm(x, (x.shape[-1],))


class Projection(nn.Module):
    """W x, W a matrix (width, in_features).

    It is not an nn.Linear, because many frameworks draw every nn.Linear of a model again: W_mix would
    then not be zero any more.
    """

    def __init__(self, in_features: int, width: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, in_features, **factory))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the matrix again; outputs start with the variance of the inputs."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return " -> ".join(map(str, reversed(self.weight.shape)))


class L3Layer(RowTable):
    """Large Lookup Layer (paper, section 3).

        L3(x, t) = W_mix [ Norm(W_up(V_t^T softmax(K_t Norm(x)))) ; x ]

    `forward` returns this delta; the model adds it: x = x + layer(x, token_ids). The norms carry no
    gains: those of the first would fold into the keys (and, tied, into W_up), those of the second into
    W_mix.

    Args:
        n_embd: width of the residual stream.
        n_emb: rows of the table.
        d_up: width after the up-projection.
        tie_kv: one table serves as keys and values; d_emb is then n_embd.
        d_emb: width of a value row when untied; n_embd by default.
        lookup: a name in `l3paper.lookup.LOOKUPS`, or a function with that signature.
        vocab_size: number of tokens, if the bounds are to be set or loaded later.
        bounds: which rows every token owns, a LongTensor (vocab_size + 1,): see allocation_to_bounds.
        device, dtype: of the parameters.

    Without bounds, `set_bounds` or a state dict must set them before the first forward pass.

    Raises ValueError for sizes below 1, an unknown lookup, a tied table with another d_emb, and bounds
    that do not fit.
    """

    def __init__(
        self,
        n_embd: int,
        n_emb: int,
        d_up: int,
        tie_kv: bool = True,
        d_emb: int | None = None,
        lookup: str | Lookup = "grouped",
        *,
        vocab_size: int | None = None,
        bounds: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        d_emb = n_embd if d_emb is None else d_emb
        super().__init__(n_embd, n_emb, tie_kv, d_emb, lookup, vocab_size, bounds, device, dtype)
        at_least(1, d_up=d_up)
        self.d_up = d_up
        self.w_up = Projection(d_emb, d_up, device=device, dtype=dtype)
        self.w_mix = Projection(d_up + n_embd, n_embd, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter again; W_mix starts at zero, so a fresh layer adds nothing."""
        super().reset_parameters(generator)
        for projection in self.projections():
            projection.reset_parameters(generator)
        nn.init.zeros_(self.w_mix.weight)

    def projections(self) -> list[Projection]:
        """The layer's matrices beside its tables: W_up and W_mix."""
        return [module for module in self.children() if isinstance(module, Projection)]

    def forward(self, x: Tensor, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
        """x (..., n_embd) and token_ids (...) to the residual's delta (..., n_embd).

        `plan`, if it is given, is `plan(token_ids)` of this layer or of one with the same bounds.
        Raises ValueError for bounds that are not set or not valid, for shapes and, outside autocast,
        types that do not fit, and, on the CPU, for ids outside the vocabulary.
        """
        self.check(x, token_ids)
        looked_up = self.look_up(rms_norm(x), token_ids, plan)  # (..., d_emb)
        up = rms_norm(self.w_up(looked_up))  # (..., d_up)
        return self.w_mix(torch.cat([up, x], dim=-1))  # (..., n_embd)

    def check(self, x: Tensor, token_ids: Tensor) -> None:
        """Raise ValueError unless they are (..., n_embd) and (...), and x has the type of the weights.

        Under autocast, x may have another type.
        """
        if not isinstance(token_ids, Tensor) or x.shape != (*token_ids.shape, self.n_embd):
            shape = (
                tuple(token_ids.shape) if isinstance(token_ids, Tensor) else type(token_ids).__name__
            )
            raise ValueError(
                f"x has shape {tuple(x.shape)} and token_ids {shape}; "
                f"they must be tensors of shapes (..., {self.n_embd}) and (...)"
            )
        own = self.w_mix.weight.dtype
        if x.dtype != own and not autocasts(x.device.type):
            raise ValueError(
                f"x is {x.dtype}, but the layer's weights are {own}: convert either, or use autocast"
            )

    def extra_repr(self) -> str:
        return (
            f"n_embd={self.n_embd}, n_emb={self.n_emb}, d_up={self.d_up}, d_emb={self.d_emb}, "
            f"tie_kv={self.tie_kv}"
        )
