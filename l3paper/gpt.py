"""A small GPT with L3 layers between its blocks, in the spirit of nanochat.

Rotary positions, queries and keys normalised, ReLU squared, RMSNorm without gains, embedding and
head untied, grouped-query attention, soft-capped logits, no biases.
"""

import torch
from torch import Tensor, nn

from l3paper.layer import rms_norm
from l3paper.lookup.grouped import Plan
from l3paper.lookup.offload import Rows
from l3paper.parts.attention import Attention, KVCache
from l3paper.parts.gpt_config import GPTConfig
from l3paper.parts.loss import chunk_cross_entropy, linear_cross_entropy, soft_cap
from l3paper.parts.moe import MoE
from l3paper.parts.optimizer import MuonAdamW
from l3paper.parts.variants import VARIANTS

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden_width, bias=False)
        self.c_proj = nn.Linear(config.hidden_width, config.n_embd, bias=False)

    def reset_parameters(self) -> None:
        """Draw every parameter anew; the output projection starts at zero, so the MLP is a no-op."""
        nn.init.normal_(self.c_fc.weight, std=self.c_fc.in_features**-0.5)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x).relu().square())  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = Attention(config.n_embd, config.n_head, config.n_kv_head)
        if config.n_experts:
            self.mlp = MoE(
                config.n_embd, config.n_experts, config.experts_per_token, config.hidden_width
            )
        else:
            self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, block: int) -> Tensor:
        x = x + self.attn(rms_norm(x), cos, sin, cache, block)
        return x + self.mlp(rms_norm(x))  # (B, T, C)


class GPT(nn.Module):
    """Decoder-only transformer; `l3_layers[str(i)]`, where there is one, follows block i.

    The model initialises itself. Its L3 layers need `set_l3_bounds`, or each its own `set_bounds`,
    before the first forward pass.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Modules draw weights when they are made. Those draws must not count, so that a seed gives a
        # model with L3 layers or experts the same attention, embedding and head as one without.
        with torch.random.fork_rng(devices=[]):
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.l3_layers = nn.ModuleDict(
                {
                    str(i): VARIANTS[config.l3_variant](
                        config.n_embd,
                        config.l3_n_emb,
                        config.d_up,
                        config.l3_tie_kv,
                        config.d_emb,
                    )
                    for i in config.l3_blocks
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.chunk_loss = chunk_cross_entropy
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every parameter anew; with all projections back into the stream at zero."""
        width = self.config.n_embd
        usual = not self.config.n_experts and self.config.hidden_width == 4 * width
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            attn = block.attn
            for linear in (attn.c_q, attn.c_k, attn.c_v):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(attn.c_proj.weight)
            if usual:
                block.mlp.reset_parameters()
            else:  # draw as much in vain, so that a seed gives the next block the same attention
                self.wte.weight.new_empty(4 * width, width).normal_()
        for layer in self.l3_layers.values():
            layer.reset_parameters()
        if not usual:
            for block in self.blocks:
                block.mlp.reset_parameters()
        self.set_rotary(self.device)

    def set_rotary(self, device: torch.device) -> None:
        """Work out the angles of all positions, which are no part of a state dict."""
        half = torch.arange(0, self.config.head_dim, 2, device=device)
        position = torch.arange(self.config.sequence_len, device=device)
        angle = torch.outer(position, ROTARY_BASE ** (-half / self.config.head_dim))
        self.cos, self.sin = angle.cos(), angle.sin()  # (sequence_len, head_dim / 2)

    def table_names(self) -> list[str]:
        """Of the parameters that are L3 tables, as in a state dict."""
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

    def new_cache(self, batch_size: int) -> KVCache:
        """For `hidden_states`, with no token in it yet."""
        c = self.config
        sizes = c.n_layer, batch_size, c.n_kv_head, c.sequence_len, c.head_dim
        return KVCache(*sizes, self.device, self.wte.weight.dtype)

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) to the normalised last hidden states (B, T, C).

        With a cache, the ids follow those that it counts, and attention looks back at all of them.
        """
        if idx.ndim != 2 or idx.shape[1] > self.config.sequence_len:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}; it must be (batch, time), "
                f"time at most sequence_len = {self.config.sequence_len}"
            )
        x = rms_norm(self.wte(idx))  # (B, T, C)
        if cache is None:
            angles = self.cos[: idx.shape[1]], self.sin[: idx.shape[1]]
        else:
            positions = cache.begin(idx.shape[1])  # (B, T)
            angles = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, ...)
        cos, sin = (table.to(x.dtype) for table in angles)
        plans = self._plans(idx)
        for i, block in enumerate(self.blocks):
            # What is compiled is for training: a cache, which changes at every step, would make it
            # compile at every step.
            x = (block if cache is None else block.forward)(x, cos, sin, cache, i)
            if str(i) in self.l3_layers:
                layer = self.l3_layers[str(i)]
                x = x + (layer if cache is None else layer.forward)(x, idx, plans[str(i)])
        return rms_norm(x)

    def compile_parts(self, backend: str = "inductor") -> None:
        """From now on, run every block, every L3 layer and the loss compiled, the lookups outside.

        Each size of batch is compiled by itself, since an evaluation's would slow the training's down.
        """
        for part in (*self.blocks, *self.l3_layers.values()):
            part.compile(backend=backend, dynamic=False)
        self.chunk_loss = torch.compile(chunk_cross_entropy, backend=backend, dynamic=False)

    def _plans(self, idx: Tensor) -> dict[str, Plan | Rows | None]:
        """For every L3 layer, made before the first block: rows that must travel start at once."""
        plans, shared = {}, {}
        for name, layer in self.l3_layers.items():
            if layer.store is not None:
                plans[name] = layer.plan(idx)
                continue
            if layer.bounds_id not in shared:  # layers with the same bounds share the sorting
                shared[layer.bounds_id] = layer.plan(idx)
            plans[name] = shared[layer.bounds_id]
        return plans

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) in float32 or better; with targets (B, T), the mean loss.

        The loss is in nats a token, over the targets that are not -1, and never holds all logits.
        """
        hidden = self.hidden_states(idx)
        if targets is not None:
            return linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                targets.flatten(),
                LOGIT_CAP,
                chunk=self.chunk_loss,
            )
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states (..., C) to capped logits (..., vocab_size), in float32 or better."""
        logits = self.lm_head(hidden)
        return soft_cap(logits if logits.dtype == torch.float64 else logits.float(), LOGIT_CAP)

    def auxiliary_loss(self) -> Tensor:
        """What the experts of all blocks add to the loss for the last forward pass: a scalar.

        It keeps the experts' load even; see `l3paper.parts.moe.MoE`. Zero for a model without experts.
        Raises ValueError where a model with experts has seen no forward pass.
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

        The AdamW rates are for width 768 and scale with 1 / sqrt(width), as in nanochat; Muon's
        orthogonal updates keep their size at any width. `weight_decay` applies to the matrices. The
        rates of tables and routers are those at which short runs ended lowest.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        routers, matrices, tables = [], [], []
        for name, parameter in self.blocks.named_parameters():
            (routers if name.endswith("router.weight") else matrices).append(parameter)
        for layer in self.l3_layers.values():
            tables += dict.fromkeys(layer.tables())  # once, where keys and values are tied
            matrices += [linear.weight for linear in layer.projections()]
        adamw = {
            "embedding": ([self.wte.weight], embedding_lr * scale),
            "head": ([self.lm_head.weight], head_lr * scale),
            "router": (routers, router_lr * scale),
            "table": (tables, table_lr * scale),
        }
        return MuonAdamW(
            {"name": "matrix", "params": matrices, "lr": matrix_lr, "weight_decay": weight_decay},
            [dict(name=name, params=ps, lr=lr) for name, (ps, lr) in adamw.items() if ps],
        )
