"""L3 layers with one part changed or left out, to ask what each part is worth.

The paper does not ablate them. Every variant takes the arguments of `L3Layer`; its costs are in
`l3paper.costs.accounting`.
"""

import torch
from torch import Tensor, nn

from l3paper.layer import L3Layer, Projection, rms_norm
from l3paper.lookup import Plan


class NoUp(L3Layer):
    """Without W_up: what was looked up is normalised and mixed as it is."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.w_up = nn.Identity()
        _narrow_mix(self, self.d_emb + self.n_embd)


class NoResidual(L3Layer):
    """Without the residual stream inside W_mix: the delta knows the context by the softmax alone."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        _narrow_mix(self, self.d_up)

    def forward(self, x: Tensor, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
        self.check(x, token_ids)
        return self.w_mix(rms_norm(self.w_up(self.look_up(rms_norm(x), token_ids, plan))))


class NormalisedResidual(L3Layer):
    """The residual stream normalised before W_mix, as what was looked up is."""

    def forward(self, x: Tensor, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
        self.check(x, token_ids)
        up = rms_norm(self.w_up(self.look_up(rms_norm(x), token_ids, plan)))
        return self.w_mix(torch.cat([up, rms_norm(x)], dim=-1))


class ScaledSoftmax(L3Layer):
    """Scores divided by sqrt(n_embd), as in attention."""

    def look_up(self, query: Tensor, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
        return super().look_up(query * self.n_embd**-0.5, token_ids, plan)


class NormalisedKeys(L3Layer):
    """Keys of length 1, so that no row can win by its length; the values keep theirs."""

    def prepare(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(keys) * self.n_embd**-0.5, values


class RandomStart(L3Layer):
    """W_mix starts like any other matrix, so the layer adds something from the first step on."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self.w_mix.reset_parameters(generator)


def _narrow_mix(layer: L3Layer, width: int) -> None:
    """Give the layer a W_mix that takes `width` numbers."""
    like = {"device": layer.w_mix.weight.device, "dtype": layer.w_mix.weight.dtype}
    layer.w_mix = Projection(width, layer.n_embd, **like)
    layer.reset_parameters()


VARIANTS: dict[str, type[L3Layer]] = {
    "": L3Layer,
    "no-up": NoUp,
    "no-residual": NoResidual,
    "normalised-residual": NormalisedResidual,
    "scaled-softmax": ScaledSoftmax,
    "normalised-keys": NormalisedKeys,
    "random-start": RandomStart,
}
