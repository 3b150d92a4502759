"""A small GPT with L3 layers between its blocks, in the spirit of nanochat (paper, sections 3 and 4).

Rotary positions, queries and keys normalised, ReLU squared, RMSNorm without gains, embedding and
head untied, grouped-query attention, soft-capped logits, no biases.

    ids -> embedding -> block 0 -> ... -> block i -> + L3 layer -> ... -> norm -> head -> logits

Read from top to bottom: the sizes, attention, the block, the model.
"""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3paper.errors import at_least, at_most, of_type, one_of
from l3paper.layer import rms_norm
from l3paper.lookup import Plan
from l3paper.lookup.grouped import check_range
from l3paper.parts.cache import BlockCache, KVCache
from l3paper.parts.device import float32_or_better, is_traced, uncompiled
from l3paper.parts.loss import chunk_cross_entropy, linear_cross_entropy, soft_cap, token_cross_entropy
from l3paper.parts.moe import MoE
from l3paper.parts.optimizer import MuonAdamW, muon_adamw
from l3paper.parts.rivals import RIVALS, Engram, Rival
from l3paper.parts.variants import VARIANTS

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0

_LARGE = 2**31 - 1
_RANGES = dict.fromkeys(("sequence_len", "vocab_size", "n_head", "n_kv_head"), (1, _LARGE))
_RANGES |= {"n_layer": (1, 10_000), "n_embd": (1, 2**20), "l3_n_emb": (0, _LARGE)}
_RANGES |= dict.fromkeys(("mlp_width", "n_experts", "expert_width", "l3_d_up", "l3_d_emb"), (0, 2**20))
_RANGES |= {"rival_rows": (0, _LARGE), "rival_d_emb": (0, 2**20), "rival_d_up": (0, 2**20)}
"""The smallest and the largest value of every size. The largest are far above what anyone trains: a
larger size is a mistake, and building it would take all memory."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the fields l3_* concern its L3 layers.

    mlp_width is the hidden width of a dense block's MLP; 0 stands for 4 * n_embd. With n_experts above
    0, every block has a mixture of experts instead, each of width expert_width; 0 there stands for
    4 * n_embd / experts_per_token, so that a token costs as much as in a dense block.

    l3_after_layers names the blocks, counted from 0 and separated by commas, that an L3 layer follows;
    "" for none. l3_d_up = 0 stands for 4 * n_embd, l3_d_emb = 0 for n_embd.
    l3_variant is a name in `l3paper.parts.variants.VARIANTS`.

    rival, a name in `l3paper.parts.rivals.RIVALS`, is the layer that follows the blocks that
    rival_after_layers names; of its sizes, it takes those that it has.

    Raises ValueError for sizes of another type, too small, absurdly large, or not fitting together.
    """

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    mlp_width: int = 0
    n_experts: int = 0
    experts_per_token: int = 2
    expert_width: int = 0
    l3_after_layers: str = ""
    l3_n_emb: int = 0
    l3_d_up: int = 0
    l3_k_max: int = 512
    l3_tie_kv: bool = True
    l3_d_emb: int = 0
    l3_variant: str = ""
    rival: str = ""
    rival_after_layers: str = ""
    rival_rows: int = 0
    rival_d_emb: int = 0
    rival_d_up: int = 0

    def __post_init__(self):
        of_type(self)
        for name, (least, most) in _RANGES.items():
            at_least(least, **{name: getattr(self, name)})
            at_most(most, **{name: getattr(self, name)})
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd = {self.n_embd} over n_head = {self.n_head} must give an even head width"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head is {self.n_kv_head}; it must divide n_head = {self.n_head}")
        if self.n_experts:
            self._check_experts()
        if self.l3_blocks:
            self._check_l3()
        one_of(("", *RIVALS), rival=self.rival)
        if bool(self.rival) != bool(self.rival_blocks):
            raise ValueError(
                f"rival is {self.rival!r} and rival_after_layers {self.rival_after_layers!r}; "
                "give both or neither"
            )

    def _check_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}; "
                f"it must be 1 .. n_experts = {self.n_experts}"
            )
        if self.mlp_width:
            raise ValueError(
                f"mlp_width is {self.mlp_width}, but with n_experts = {self.n_experts} no block has an "
                "MLP; give expert_width, or one of the two as 0"
            )
        if not self.expert_width and 4 * self.n_embd % self.experts_per_token:
            raise ValueError(
                f"expert_width is 0, but experts_per_token = {self.experts_per_token} does not divide "
                f"4 * n_embd = {4 * self.n_embd}; give a width of at least 1"
            )

    def _check_l3(self) -> None:
        one_of(VARIANTS, l3_variant=self.l3_variant)
        at_least(1, l3_k_max=self.l3_k_max)
        if self.l3_n_emb < self.vocab_size:
            raise ValueError(
                f"l3_n_emb is {self.l3_n_emb}; every token needs a row: at least {self.vocab_size}"
            )
        if self.l3_tie_kv and self.l3_d_emb not in (0, self.n_embd):
            raise ValueError(
                f"l3_d_emb is {self.l3_d_emb}, but tied keys and values need n_embd = {self.n_embd}"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_width(self) -> int:
        """The hidden width of a dense block's MLP, or of one expert."""
        if self.n_experts:
            return self.expert_width or 4 * self.n_embd // self.experts_per_token
        return self.mlp_width or 4 * self.n_embd

    @property
    def d_up(self) -> int:
        """As `L3Layer` takes it."""
        return self.l3_d_up or 4 * self.n_embd

    @property
    def d_emb(self) -> int:
        """As `L3Layer` takes it."""
        return self.l3_d_emb or self.n_embd

    @property
    def row_numbers(self) -> int:
        """Numbers in a key row and its value row, which are the same row if they are tied."""
        return self.n_embd if self.l3_tie_kv else self.n_embd + self.d_emb

    @property
    def l3_blocks(self) -> list[int]:
        """`l3_after_layers` as ascending block numbers."""
        return self._blocks("l3_after_layers")

    @property
    def rival_blocks(self) -> list[int]:
        """`rival_after_layers` as ascending block numbers."""
        return self._blocks("rival_after_layers")

    def _blocks(self, name: str) -> list[int]:
        written = getattr(self, name)
        if not written.strip():
            return []
        try:
            blocks = sorted(int(part) for part in written.split(","))
        except ValueError as error:
            raise ValueError(
                f"{name} is {written!r}; give block numbers such as '2' or '1,3'"
            ) from error
        if blocks[0] < 0 or blocks[-1] >= self.n_layer or len(set(blocks)) < len(blocks):
            raise ValueError(
                f"{name} is {written!r}; give different blocks out of 0 .. {self.n_layer - 1}"
            )
        return blocks


class Attention(nn.Module):
    """Causal self-attention; `n_kv_head` heads of keys and values serve `n_head` of queries."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter again; the output projection starts at zero, so it adds nothing."""
        for linear in (self.c_q, self.c_k, self.c_v):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: BlockCache | None) -> Tensor:
        """x (B, T, C) to (B, T, C); with a cache, x follows the tokens in it."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for linear in (self.c_q, self.c_k, self.c_v)
        )
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v.to(q.dtype),
            attn_mask=None if cache is None else cache.mask,
            is_causal=cache is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., T, head_dim); cos and sin (..., T, head_dim / 2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


class MLP(nn.Module):
    """The feed-forward part of a dense block, with ReLU squared."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=False)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter again; the output projection starts at zero, so it adds nothing."""
        nn.init.normal_(self.c_fc.weight, std=self.c_fc.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x).relu().square())  # (B, T, C)


class Block(nn.Module):
    """Attention, then an MLP or experts, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        self.attn = Attention(c)
        if c.n_experts:
            self.mlp = MoE(c.n_embd, c.n_experts, c.experts_per_token, c.hidden_width)
        else:
            self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: BlockCache | None) -> Tensor:
        x = x + self.attn(rms_norm(x), cos, sin, cache)
        return x + self.mlp(rms_norm(x))  # (B, T, C)


class GPT(nn.Module):
    """Decoder-only transformer. `l3_layers[str(i)]` follows block i, if there is one, as do `rivals`.

    The model initialises itself. Its L3 layers need `set_l3_bounds`, or each its own `set_bounds`,
    or a state dict, before the first forward pass.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # modules draw when they are made; none of it counts
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.l3_layers = nn.ModuleDict({str(i): self._l3_layer() for i in config.l3_blocks})
            self.rivals = nn.ModuleDict({str(i): self._rival() for i in config.rival_blocks})
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.chunk_loss = chunk_cross_entropy
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.init_weights()

    def _l3_layer(self) -> nn.Module:
        c = self.config
        layer = VARIANTS[c.l3_variant]
        return layer(c.n_embd, c.l3_n_emb, c.d_up, c.l3_tie_kv, c.d_emb, vocab_size=c.vocab_size)

    def _rival(self) -> Rival:
        c = self.config
        sizes = {
            "mlp": (c.rival_d_up,),
            "per-layer-embedding": (c.vocab_size, c.rival_d_emb, c.rival_d_up),
            "engram": (c.rival_rows, c.rival_d_emb),
        }
        return RIVALS[c.rival](c.n_embd, *sizes[c.rival])

    def init_weights(self) -> None:
        """Draw every parameter again; all projections back into the stream start at zero.

        PyTorch's generator gives one seed, and every part draws from a generator of its own, seeded by
        that and by the part's name. So a seed gives models with and without L3 layers, or with other
        MLPs, the same attention, embedding and head. On the meta device there is nothing to draw.
        """
        if self.device.type != "meta":
            seed = int(torch.randint(2**62, ()))

            def generator(name: str) -> torch.Generator:
                return torch.Generator(self.device).manual_seed(seed ^ zlib.crc32(name.encode()))

            nn.init.normal_(self.wte.weight, generator=generator("wte"))
            nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator("lm_head"))
            for i, block in enumerate(self.blocks):
                block.attn.reset_parameters(generator(f"attention {i}"))
                block.mlp.reset_parameters(generator(f"mlp {i}"))
            for i, layer in self.l3_layers.items():
                layer.reset_parameters(generator(f"l3 {i}"))
            for i, layer in self.rivals.items():
                layer.reset_parameters(generator(f"rival {i}"))
        self.set_constants(self.device)

    def set_constants(self, device: torch.device) -> None:
        """Compute what is not part of a state dict: angles of positions, places of Engram tables."""
        half = torch.arange(0, self.config.head_dim, 2, device=device)
        position = torch.arange(self.config.sequence_len, device=device)
        angle = torch.outer(position, ROTARY_BASE ** (-half / self.config.head_dim))
        self.cos, self.sin = angle.cos(), angle.sin()  # (sequence_len, head_dim / 2)
        for layer in self.rivals.values():
            if isinstance(layer, Engram):
                layer.set_places(device)

    def table_names(self) -> list[str]:
        """The names of the parameters that are L3 tables, as in a state dict."""
        return [
            f"l3_layers.{name}.{table}"
            for name, layer in self.l3_layers.items()
            for table in layer.table_names()
        ]

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def set_l3_bounds(self, bounds: Tensor) -> None:
        """Give every L3 layer the same allocation, a LongTensor (vocab_size + 1,)."""
        if len(bounds) != self.config.vocab_size + 1:
            raise ValueError(
                f"bounds have {len(bounds)} entries; they must be vocab_size + 1 = "
                f"{self.config.vocab_size + 1}"
            )
        for layer in self.l3_layers.values():
            layer.set_bounds(bounds)

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """An empty cache for `hidden_states`, of `length` tokens per sequence or sequence_len."""
        c = self.config
        sizes = c.n_layer, batch_size, c.n_kv_head, length or c.sequence_len, c.head_dim
        looks_back = [name for name, layer in self.rivals.items() if isinstance(layer, Engram)]
        return KVCache(*sizes, self.device, self.wte.weight.dtype, looks_back, c.n_embd)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) to the normalised last hidden states (B, T, C).

        With a cache, the ids follow those that it counts, and attention looks back at all of them. What
        is compiled is for training: a cache changes its shapes at every step, and runs uncompiled.

        Raises ValueError for ids of another shape, for more than sequence_len of them and, on the CPU,
        for ids outside the vocabulary.
        """
        if idx.ndim != 2 or idx.shape[1] > self.config.sequence_len:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}; it must be (batch, time), "
                f"time at most sequence_len = {self.config.sequence_len}"
            )
        if idx.numel() and not (is_traced(idx) or idx.is_cuda):  # to look would be to wait
            check_range(*idx.aminmax(), self.config.vocab_size)
        x = rms_norm(self.wte(idx))  # (B, T, C)
        histories = {}
        if cache is None:
            caches = [None] * len(self.blocks)
            angles = self.cos[: idx.shape[1]], self.sin[: idx.shape[1]]  # (T, head_dim / 2)
        else:
            caches = cache.begin(idx.shape[1])
            positions = caches[0].positions  # (B, T)
            histories = cache.histories(positions)
            angles = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, ...)
        cos, sin = (table.to(x.dtype) for table in angles)
        plans = self.plans(idx)
        with nullcontext() if cache is None else uncompiled():
            for i, block in enumerate(self.blocks):
                x = block(x, cos, sin, caches[i])
                if str(i) in self.l3_layers:
                    x = x + self.l3_layers[str(i)](x, idx, plans[str(i)])
                if str(i) in self.rivals:
                    x = x + self.rivals[str(i)](x, idx, histories.get(str(i)))
        return rms_norm(x)

    def plans(self, idx: Tensor) -> dict[str, Plan]:
        """How every L3 layer looks these ids up, decided before the first block.

        Layers with the same bounds share a plan. Rows that a store serves start to travel now.
        """
        plans, shared, compiling = {}, {}, torch.compiler.is_compiling()
        for name, layer in self.l3_layers.items():
            # A compiler cannot read bounds.
            key = layer.store or (name if compiling else layer.bounds_id(), layer.lookup)
            if key not in shared:
                shared[key] = layer.plan(idx)
            plans[name] = shared[key]
        return plans

    def compile_parts(self, backend: str = "inductor") -> None:
        """From now on, run every block, every L3 layer and the loss compiled, a lookup as one operator.

        Each batch size is compiled by itself, since an evaluation's would slow the training's down.
        """
        for part in (*self.blocks, *self.l3_layers.values(), *self.rivals.values()):
            part.compile(backend=backend, dynamic=False)
        self.chunk_loss = torch.compile(chunk_cross_entropy, backend=backend, dynamic=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) in float32 or better; with targets (B, T), the mean loss.

        The loss is in nats per token, over the targets that are not -1, and never holds all logits.
        Raises what `hidden_states` raises, and ValueError for targets of another shape than the ids.
        """
        hidden = self.hidden_states(idx)
        if targets is not None:
            _check_targets(idx, targets)
            return linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                targets.flatten(),
                LOGIT_CAP,
                chunk=self.chunk_loss,
            )
        return self.logits(hidden)

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss (B, T) of each target (B, T) of ids (B, T), in nats, without gradients.

        It is 0 for targets of -1. The logits of all tokens are never held at once. Raises ValueError
        as `forward` does.
        """
        _check_targets(idx, targets)
        hidden = self.hidden_states(idx).flatten(0, 1)
        losses = token_cross_entropy(hidden, self.lm_head.weight, targets.flatten(), LOGIT_CAP)
        return losses.view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states (..., C) to capped logits (..., vocab_size), in float32 or better."""
        logits = self.lm_head(hidden)
        return soft_cap(logits.to(float32_or_better(logits.dtype)), LOGIT_CAP)

    def auxiliary_loss(self) -> Tensor:
        """The balance losses of all experts in the last forward pass: a scalar to add to the loss.

        See `l3paper.parts.moe.MoE`; zero for a model without experts. Raises ValueError before the
        first forward pass.
        """
        if not self.config.n_experts:
            return torch.zeros((), device=self.device)
        losses = [block.mlp.auxiliary for block in self.blocks]
        if losses[0] is None:
            raise ValueError("the model has no auxiliary loss yet: call forward")
        return torch.stack(losses).sum()

    def setup_optimizer(
        self,
        matrix_lr: float = 0.02,
        embedding_lr: float = 0.2,
        head_lr: float = 0.004,
        table_lr: float = 0.003,
        router_lr: float = 0.01,
        weight_decay: float = 0.0,
    ) -> MuonAdamW:
        """One optimizer for all parameters: matrices under Muon, the rest under AdamW.

        See `l3paper.parts.optimizer.muon_adamw`. `weight_decay` applies to the matrices. The rates of
        tables and routers are those at which short runs ended lowest.
        """
        return muon_adamw(
            self,
            matrix_lr=matrix_lr,
            weight_decay=weight_decay,
            embedding=embedding_lr,
            head=head_lr,
            table=table_lr,
            router=router_lr,
        )


def _check_targets(idx: Tensor, targets: Tensor) -> None:
    if targets.shape != idx.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; it must be that of idx: {tuple(idx.shape)}"
        )
