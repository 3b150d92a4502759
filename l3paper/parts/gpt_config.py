"""The sizes of a GPT, checked: what fits together, and what is worked out where nothing is said."""

from dataclasses import dataclass

from l3paper.parts.variants import VARIANTS

_MOST = {"n_layer": 10_000} | dict.fromkeys(
    ("n_embd", "mlp_width", "n_experts", "expert_width", "l3_d_up", "l3_d_emb"), 2**20
)
"""Far above what anyone trains: what is larger is a mistake, and would be built until memory ends."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the fields l3_* concern its L3 layers.

    mlp_width is the hidden width of a dense block's MLP; 0 stands for 4 * n_embd. With n_experts above
    0, every block has a mixture of experts instead, each of width expert_width; 0 there stands for
    4 * n_embd / experts_per_token, so that a token costs as much as in a dense block.

    l3_after_layers names the blocks, counted from 0 and separated by commas, behind each of which
    an L3 layer sits; "" for none. l3_d_up = 0 stands for 4 * n_embd, l3_d_emb = 0 for n_embd.
    l3_variant is a name in `l3paper.parts.variants.VARIANTS`.

    Raises ValueError for sizes that are too small, absurdly large, or do not fit together.
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

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {most}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd = {self.n_embd} over n_head = {self.n_head} is no even whole head width"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head is {self.n_kv_head}; it must divide n_head = {self.n_head}")
        for name in ("mlp_width", "n_experts", "expert_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.n_experts:
            self._check_experts()
        if self.l3_blocks:
            self._check_l3()

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
        if self.l3_variant not in VARIANTS:
            raise ValueError(
                f"l3_variant is {self.l3_variant!r}; choose one of {', '.join(filter(None, VARIANTS))}"
            )
        if self.l3_n_emb < self.vocab_size:
            raise ValueError(
                f"l3_n_emb is {self.l3_n_emb}; every token needs a row: at least {self.vocab_size}"
            )
        if self.l3_k_max < 1:
            raise ValueError(f"l3_k_max is {self.l3_k_max}; it must be at least 1")
        if self.l3_tie_kv and self.l3_d_emb not in (0, self.n_embd):
            raise ValueError(
                f"l3_d_emb is {self.l3_d_emb}, but tied keys and values need n_embd = {self.n_embd}"
            )
        for name in ("l3_d_up", "l3_d_emb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_width(self) -> int:
        """Of a dense block's MLP, or of one expert."""
        if self.n_experts:
            return self.expert_width or 4 * self.n_embd // self.experts_per_token
        return self.mlp_width or 4 * self.n_embd

    @property
    def d_up(self) -> int:
        """Of the L3 layers, as `L3Layer` takes it."""
        return self.l3_d_up or 4 * self.n_embd

    @property
    def d_emb(self) -> int:
        """Of the L3 layers, as `L3Layer` takes it."""
        return self.l3_d_emb or self.n_embd

    @property
    def row_numbers(self) -> int:
        """Numbers in a key row and its value row, which are one where they are tied."""
        return self.n_embd if self.l3_tie_kv else self.n_embd + self.d_emb

    @property
    def l3_blocks(self) -> list[int]:
        """`l3_after_layers` as ascending block numbers."""
        if not self.l3_after_layers.strip():
            return []
        try:
            blocks = sorted(int(part) for part in self.l3_after_layers.split(","))
        except ValueError:
            raise ValueError(
                f"l3_after_layers is {self.l3_after_layers!r}; give block numbers such as '2' or '1,3'"
            ) from None
        if blocks[0] < 0 or blocks[-1] >= self.n_layer or len(set(blocks)) < len(blocks):
            raise ValueError(
                f"l3_after_layers is {self.l3_after_layers!r}; "
                f"give different blocks out of 0 .. {self.n_layer - 1}"
            )
        return blocks
