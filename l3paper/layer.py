"""The L3 layer: a lookup into the token's own rows, mixed with the residual stream.

code          paper        meaning
----          -----        -------
n_embd        d_in, d_out  width of the residual stream
n_emb         v            rows of the table, all tokens together
d_emb         d_emb        width of a value row
d_up          d_up         width after the up-projection
bounds        -            token t owns rows bounds[t] : bounds[t + 1]
kv_weight     W_K = W_V    the table, tied; k_weight and v_weight when untied
w_up, w_mix   W_up, W_mix  the two projections
"""

import hashlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.lookup.grouped import Plan, grouped, make_plan
from l3paper.lookup.offload import Rows, RowStore
from l3paper.lookup.reference import LOOKUPS, Lookup, padded
from l3paper.parts.device import eager

FEW = 2**18
"""Numbers, padding included, that may be gathered to look a few positions up without grouping them.

Where both ways cost the same on two CPU cores, at widths from 64 to 1,024.
"""


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without gains."""
    return F.rms_norm(x, (x.shape[-1],))


class L3Layer(nn.Module):
    """Large Lookup Layer (paper, section 3).

        delta = W_mix [ Norm(W_up(V_t^T softmax(K_t Norm(x)))) ; x ]

    `forward` returns delta; the model adds it: x = x + layer(x, token_ids). The norms carry no
    gains: those of the first would fold into the keys (and, tied, into W_up), those of the second into
    W_mix.

    Args:
        n_embd: width of the residual stream.
        n_emb: rows of the table.
        d_up: width after the up-projection.
        tie_kv: one table serves as keys and values; d_emb is then n_embd.
        d_emb: width of a value row when untied; n_embd by default.
        lookup: a name in `l3paper.lookup.reference.LOOKUPS`, or a function with that signature.

    `set_bounds` must give every token its rows before the first forward pass. A state dict carries
    the bounds, so a layer that loads one needs no set_bounds. `bounds_id` is equal for equal bounds.

    Raises ValueError for sizes below 1, an unknown lookup, and a tied table with another d_emb.
    """

    bounds: Tensor | None
    bounds_id: str | None

    def __init__(
        self,
        n_embd: int,
        n_emb: int,
        d_up: int,
        tie_kv: bool = True,
        d_emb: int | None = None,
        lookup: str | Lookup = "grouped",
    ):
        super().__init__()
        d_emb = n_embd if d_emb is None else d_emb
        for name, size in dict(n_embd=n_embd, n_emb=n_emb, d_up=d_up, d_emb=d_emb).items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if tie_kv and d_emb != n_embd:
            raise ValueError(f"d_emb is {d_emb}, but tied keys and values need n_embd = {n_embd}")
        if not callable(lookup) and lookup not in LOOKUPS:
            raise ValueError(f"lookup is {lookup!r}; choose one of {', '.join(LOOKUPS)}")
        self.n_embd, self.n_emb, self.d_up, self.d_emb = n_embd, n_emb, d_up, d_emb
        self.tie_kv = tie_kv
        self.lookup = lookup if callable(lookup) else LOOKUPS[lookup]
        if tie_kv:
            self.kv_weight = nn.Parameter(torch.empty(n_emb, n_embd))
        else:
            self.k_weight = nn.Parameter(torch.empty(n_emb, n_embd))
            self.v_weight = nn.Parameter(torch.empty(n_emb, d_emb))
        self.w_up = nn.Linear(d_emb, d_up, bias=False)
        self.w_mix = nn.Linear(d_up + n_embd, n_embd, bias=False)
        self.store: RowStore | None = None
        self.register_buffer("bounds", None)
        self.bounds_id = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Key scores start with unit variance; W_mix starts at zero, so the layer is a no-op."""
        keys, values = self.tables()
        nn.init.normal_(keys, std=self.n_embd**-0.5)
        if values is not keys:
            nn.init.normal_(values, std=self.d_emb**-0.5)
        *up, mix = self.projections()
        for linear in up:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(mix.weight)

    def projections(self) -> list[nn.Linear]:
        """The layer's matrices beside its tables; W_mix is the last."""
        return [self.w_up, self.w_mix]

    def tables(self) -> tuple[Tensor, Tensor]:
        """(keys, values), shapes (n_emb, n_embd) and (n_emb, d_emb); one tensor twice when tied.

        Raises ValueError for a layer whose rows come from a store, which has none.
        """
        if self.store is not None:
            raise ValueError("the layer's rows come from a store; it has no tables of its own")
        return (self.kv_weight,) * 2 if self.tie_kv else (self.k_weight, self.v_weight)

    def set_bounds(self, bounds: Tensor) -> None:
        """Say which rows every token owns: a LongTensor (vocab_size + 1,).

        Raises ValueError unless bounds start at 0, rise with every token and end at n_emb.
        """
        if complaint := self._complaint(bounds):
            raise ValueError(complaint)
        # A clone: what the caller does to its tensor later must not move our rows.
        self.bounds = bounds.detach().clone().to(self.w_mix.weight.device)
        self.bounds_id = _digest(bounds)

    def serve_from(self, store: RowStore) -> None:
        """From now on, take rows from `store`: the layer's tables are no parameters any more."""
        for name in self.table_names():
            self._parameters.pop(name, None)
        self.store = store

    def table_names(self) -> tuple[str, ...]:
        """Of the parameters that hold keys and values."""
        return ("kv_weight",) if self.tie_kv else ("k_weight", "v_weight")

    @eager
    def plan(self, token_ids: Tensor) -> Plan | Rows | None:
        """What the layer needs to know of these ids (...), for all layers with the same bounds_id.

        Where a store serves the rows, it is those, on their way, and for this layer alone. None where
        the lookup needs no plan. Raises ValueError before set_bounds and, where they are on the CPU,
        for ids outside the vocabulary.
        """
        self._check_ids(token_ids)
        if self.store is not None:
            return self.store.fetch(token_ids)
        if self.lookup is not grouped or _few(token_ids, self.bounds, self.n_embd):
            return None
        return make_plan(token_ids.flatten(), self.bounds, self.n_emb)

    def forward(self, x: Tensor, token_ids: Tensor, plan: Plan | Rows | None = None) -> Tensor:
        """x (..., n_embd) and token_ids (...) to the residual's delta (..., n_embd).

        `plan`, where given, is `plan(token_ids)` of this layer or of one with the same bounds_id.
        Raises ValueError before set_bounds, for shapes that do not fit, and, where they are on the CPU,
        for ids outside the vocabulary.
        """
        if plan is None:
            plan = self.plan(token_ids)
        if not x.ndim or x.shape[-1] != self.n_embd or x.shape[:-1] != token_ids.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and token_ids {tuple(token_ids.shape)}; "
                f"they must be (..., {self.n_embd}) and (...)"
            )
        if isinstance(plan, Rows):
            plan.wait()
            token_ids, bounds, *tables = plan[:4]
        else:
            bounds, tables = self.bounds, self.tables()
        if isinstance(plan, Plan):
            lookup = partial(grouped, plan=plan)
        elif self.lookup is grouped and _few(token_ids, bounds, self.n_embd):
            lookup = padded
        else:
            lookup = self.lookup
        query = self.query(x).reshape(-1, self.n_embd)  # (N, n_embd)
        tables = autocast_tables(*self.rows(*tables))
        found = lookup(query, token_ids.flatten(), bounds, *tables)  # (N, d_emb)
        return self.mix(found.view(*x.shape[:-1], self.d_emb), x)  # (..., n_embd)

    # The three parts that l3paper.parts.variants change:

    def query(self, x: Tensor) -> Tensor:
        """x (..., n_embd) to the vectors that meet the keys, of the same shape."""
        return rms_norm(x)

    def rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables (v, n_embd) and (v, d_emb) as the lookup takes them."""
        return keys, values

    def mix(self, found: Tensor, x: Tensor) -> Tensor:
        """What was found (..., d_emb) and x (..., n_embd) to the delta (..., n_embd)."""
        up = rms_norm(self.w_up(found))  # (..., d_up)
        return self.w_mix(torch.cat([up, x], dim=-1))

    def extra_repr(self) -> str:
        return (
            f"n_embd={self.n_embd}, n_emb={self.n_emb}, d_up={self.d_up}, d_emb={self.d_emb}, "
            f"tie_kv={self.tie_kv}"
        )

    def _complaint(self, bounds: Tensor) -> str | None:
        if not isinstance(bounds, Tensor) or bounds.dtype != torch.long or bounds.ndim != 1:
            return "bounds must be a one-dimensional LongTensor: see allocation_to_bounds"
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.n_emb:
            ends = bounds[[0, -1]].tolist() if len(bounds) else []
            return f"bounds run over {ends}; they must start at 0 and end at n_emb = {self.n_emb}"
        if not (bounds.diff() >= 1).all():
            token = int((bounds.diff() < 1).nonzero()[0])
            return f"bounds must rise: token {token} owns no row"
        return None

    def _check_ids(self, token_ids: Tensor) -> None:
        if self.bounds is None:
            raise ValueError("the layer has no bounds yet: call set_bounds(allocation_to_bounds(...))")
        if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.long, torch.int):
            raise ValueError("token_ids must be a tensor of whole numbers, int64 or int32")
        vocab_size = len(self.bounds) - 1
        if token_ids.is_cuda:  # to look would be to wait for the device
            return
        if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
            raise ValueError(
                f"token_ids span {int(token_ids.min())} .. {int(token_ids.max())}; "
                f"the bounds cover 0 .. {vocab_size - 1}"
            )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take over the state dict's bounds, whatever vocabulary they are for, once they are valid.

        A state dict without bounds leaves the layer's own in place.
        """
        bounds = state_dict.get(prefix + "bounds")
        if bounds is not None:
            if complaint := self._complaint(bounds):
                error_msgs.append(f"{prefix}bounds: {complaint}")
                return
            self.bounds = torch.empty_like(bounds, device=self.w_mix.weight.device)
            self.bounds_id = _digest(bounds)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if bounds is None and prefix + "bounds" in missing_keys:
            missing_keys.remove(prefix + "bounds")


def autocast_tables(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The tables in autocast's type, as a linear layer's weights would be, while they are trained.

    A copy of hundreds of thousands of rows is worth it for the positions of a training batch, not for
    the one a sequence of decoding. Without gradients, tables keep their own type, so that a text does
    not depend on where they are.
    """
    kind = keys.device.type
    if not torch.is_autocast_enabled(kind) or not (torch.is_grad_enabled() and keys.requires_grad):
        return keys, values
    low = torch.get_autocast_dtype(kind)
    copy = keys.to(low)
    return copy, copy if values is keys else values.to(low)


def _few(token_ids: Tensor, bounds: Tensor, width: int) -> bool:
    """Whether, in decoding on a CPU, gathering these ids' keys (rows, width) costs less than a plan."""
    positions = token_ids.numel()
    if torch.is_grad_enabled() or token_ids.is_cuda or not 0 < positions * width <= FEW:
        return False
    longest = int((bounds[token_ids + 1] - bounds[token_ids]).max())
    return positions * longest * width <= FEW


def _digest(bounds: Tensor) -> str:
    return hashlib.sha256(bounds.cpu().numpy().tobytes()).hexdigest()
