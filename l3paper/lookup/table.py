"""The table of rows: what every token owns, and the lookup of a batch (paper, section 3).

code            paper      shape                             meaning
----            -----      -----                             -------
kv_weight       W_K = W_V  (n_emb, n_embd)                   the table, when keys and values are tied
k_weight        W_K        (n_emb, n_embd)                   the keys, when they are not
v_weight        W_V        (n_emb, d_emb)                    and the values
bounds          -          (vocab_size + 1,)                 rows bounds[t] : bounds[t + 1] are K_t, V_t
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l3paper.allocation import allocation_to_bounds
from l3paper.errors import at_least, one_of
from l3paper.lookup import LOOKUPS, Lookup, Plan
from l3paper.lookup.grouped import check_range
from l3paper.lookup.offload import RowStore, StoredPlan
from l3paper.lookup.operators import make_plan
from l3paper.parts.device import autocasts, eager, is_traced


class RowTable(nn.Module):
    """Keys, values and bounds of all tokens, and their lookup; the base class of `L3Layer`.

    The buffer `bounds` exists from construction, so that every loader of checkpoints finds it. Until
    `set_bounds` or a state dict sets it, it is zeros, one element if the vocabulary is not known yet.
    """

    bounds: Tensor

    def __init__(
        self,
        n_embd: int,
        n_emb: int,
        tie_kv: bool,
        d_emb: int,
        lookup: str | Lookup,
        vocab_size: int | None,
        bounds: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        at_least(1, n_embd=n_embd, n_emb=n_emb, d_emb=d_emb)
        if tie_kv and d_emb != n_embd:
            raise ValueError(f"d_emb is {d_emb}, but tied keys and values need n_embd = {n_embd}")
        if not callable(lookup):
            one_of(LOOKUPS, lookup=lookup)
        self.n_embd, self.n_emb, self.d_emb, self.tie_kv = n_embd, n_emb, d_emb, tie_kv
        self.lookup = lookup if callable(lookup) else LOOKUPS[lookup]
        factory = {"device": device, "dtype": dtype}
        if tie_kv:
            self.kv_weight = nn.Parameter(torch.empty(n_emb, n_embd, **factory))
        else:
            self.k_weight = nn.Parameter(torch.empty(n_emb, n_embd, **factory))
            self.v_weight = nn.Parameter(torch.empty(n_emb, d_emb, **factory))
        self.store: RowStore | None = None
        if vocab_size is not None:
            at_least(1, vocab_size=vocab_size)
            if bounds is not None and len(bounds) != vocab_size + 1:
                raise ValueError(
                    f"vocab_size is {vocab_size}, but bounds have {len(bounds)} entries; give them "
                    "vocab_size + 1, or leave vocab_size out"
                )
        size = 1 if vocab_size is None else vocab_size + 1
        self.register_buffer("bounds", torch.zeros(size, dtype=torch.long, device=device))
        self._checked: tuple[Tensor, int, str] | None = None
        if bounds is not None:
            self.set_bounds(bounds)
        self.register_load_state_dict_pre_hook(_adopt_bounds)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the rows again; key scores start with unit variance."""
        for table in dict.fromkeys(self.tables()):
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(keys, values), shapes (n_emb, n_embd) and (n_emb, d_emb); one tensor twice when tied.

        Raises ValueError for a layer whose rows come from a store, which has none.
        """
        if self.store is not None:
            raise ValueError("the layer's rows come from a store; it has no tables of its own")
        return (self.kv_weight,) * 2 if self.tie_kv else (self.k_weight, self.v_weight)

    def table_names(self) -> tuple[str, ...]:
        """The names of the parameters that hold keys and values."""
        return ("kv_weight",) if self.tie_kv else ("k_weight", "v_weight")

    def serve_from(self, store: RowStore) -> None:
        """From now on, take rows from `store`: the layer's tables are not parameters any more."""
        for name in self.table_names():
            self._parameters.pop(name, None)
        self.store = store

    def set_bounds(self, bounds: Tensor) -> None:
        """Say which rows every token owns: a LongTensor (vocab_size + 1,).

        Raises ValueError unless bounds start at 0, rise with every token and end at n_emb, and for a
        layer served from a store, which has bounds of its own.
        """
        if self.store is not None:
            raise ValueError("the layer's rows come from a store; its bounds cannot be set any more")
        if complaint := _complaint(bounds, self.n_emb):
            raise ValueError(complaint)
        # A clone: what the caller does to its tensor later must not move our rows.
        self.bounds = bounds.detach().clone().to(self.bounds.device)

    @torch.no_grad()
    def grow(self, rows: Sequence[int], generator: torch.Generator | None = None) -> None:
        """Add tokens to the end of the vocabulary: as many as there are in `rows`, which says how many
        rows, at least one, each of them owns.

        The rows of all other tokens stay as they are; new ones are drawn. The tables are new parameters
        afterwards, which optimizers do not know. Raises ValueError for bounds that are not set or not
        valid, for `rows` that are not integers of at least 1, and for a layer served from a store.
        """
        self.bounds_id()
        new = allocation_to_bounds(rows)
        for name, table in zip(self.table_names(), dict.fromkeys(self.tables()), strict=True):
            drawn = table.new_empty(int(new[-1]), table.shape[1])
            nn.init.normal_(drawn, std=table.shape[1] ** -0.5, generator=generator)
            grown = nn.Parameter(torch.cat([table, drawn]), requires_grad=table.requires_grad)
            setattr(self, name, grown)
        self.bounds = torch.cat([self.bounds, self.n_emb + new[1:].to(self.bounds.device)])
        self.n_emb += int(new[-1])

    def bounds_id(self) -> str:
        """A string that is equal for equal bounds.

        Raises ValueError for bounds that are not set or not valid. Bounds are checked once after every
        change, whatever made it, since a check waits for the device.
        """
        version = 0 if self.bounds.is_inference() else self.bounds._version
        if self._checked is None or self._checked[0] is not self.bounds or self._checked[1] != version:
            bounds = self.bounds.cpu()
            if not bounds.any():
                raise ValueError(
                    "the layer has no bounds yet: call set_bounds(allocation_to_bounds(...))"
                )
            if complaint := _complaint(bounds, self.n_emb):
                raise ValueError(complaint)
            # A list, since a tensor has no bytes to show inside the transforms of torch.func.
            digest = hashlib.sha256(str(bounds.tolist()).encode()).hexdigest()
            self._checked = self.bounds, version, digest
        return self._checked[2]

    def plan(self, token_ids: Tensor) -> Plan:
        """How the positions with these ids (...) are looked up.

        It serves all layers with the same `bounds_id` and `lookup`, unless a store serves the rows:
        then the plan brings them, and their copy starts now. Raises ValueError for bounds that are
        not set or not valid and, on the CPU, for ids outside the vocabulary; what is compiled finds
        only those of the batch's tokens, and when it runs.
        """
        if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.long, torch.int):
            raise ValueError("token_ids must be a tensor of integers, int64 or int32")
        if self.store is not None:
            return self._fetch(token_ids.flatten())
        if not is_traced(token_ids):
            self._check(token_ids)
        return make_plan(self.lookup, token_ids.flatten(), self.bounds, self.n_emb)

    @eager
    def _fetch(self, ids: Tensor) -> StoredPlan:
        self._check(ids)
        rows = self.store.fetch(ids)
        return StoredPlan(self.lookup, rows.token_ids, rows.bounds, rows)

    def look_up(self, query: Tensor, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
        """V_t^T softmax(K_t query), where t is each position's token: (..., n_embd) to (..., d_emb).

        `plan`, if it is given, is `plan(token_ids)` of this layer or of one that it serves, too.
        """
        if plan is None:
            plan = self.plan(token_ids)
        keys, values = _autocast(*self.prepare(*(plan.tables or self.tables())))
        looked_up = plan(query.reshape(-1, self.n_embd), keys, values)  # (N, d_emb)
        return looked_up.view(*query.shape[:-1], self.d_emb)

    def prepare(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables as the lookup takes them: as they are, unless a variant changes them."""
        return keys, values

    def _check(self, token_ids: Tensor) -> None:
        self.bounds_id()
        if token_ids.numel() and not token_ids.is_cuda:  # to look would be to wait for the device
            check_range(*token_ids.aminmax(), len(self.bounds) - 1)


def _autocast(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The tables in autocast's type, as a linear layer's weights would be, while they are trained.

    Without gradients they keep their own type: decoding looks up too few positions to pay for a copy
    of the whole table, and its text must not depend on where the table is.
    """
    kind = keys.device.type
    if not (autocasts(kind) and torch.is_grad_enabled() and keys.requires_grad):
        return keys, values
    low = torch.get_autocast_dtype(kind)
    copy = keys.to(low)
    return copy, copy if values is keys else values.to(low)


def _complaint(bounds: Tensor, n_emb: int) -> str | None:
    """What is wrong with these bounds, if anything is."""
    if not isinstance(bounds, Tensor) or bounds.dtype != torch.long or bounds.ndim != 1:
        return "bounds must be a one-dimensional LongTensor: see allocation_to_bounds"
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n_emb:
        ends = bounds[[0, -1]].tolist() if len(bounds) else []
        return f"bounds run over {ends}; they must start at 0 and end at n_emb = {n_emb}"
    if not (bounds.diff() >= 1).all():
        token = int((bounds.diff() < 1).nonzero()[0])
        return f"bounds must rise: token {token} owns no row"
    return None


def _adopt_bounds(module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Make room for the state dict's bounds, whatever vocabulary they are for, if they are valid.

    A state dict that has none, or zeros, leaves the layer's own in place.
    """
    name = prefix + "bounds"
    bounds = state_dict.get(name)
    if bounds is None or not (bounds.is_meta or bounds.any()):
        state_dict[name] = module.bounds
        return
    if not bounds.is_meta and (complaint := _complaint(bounds, module.n_emb)):
        errors.append(f"{name}: {complaint}")
        state_dict[name] = module.bounds
    elif bounds.shape != module.bounds.shape:
        module.bounds = torch.zeros_like(bounds, device=module.bounds.device)
