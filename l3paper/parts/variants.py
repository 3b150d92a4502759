"""L3 layers with one part changed or left out, to ask what each part is worth.

The paper does not ablate them. Every variant takes the arguments of `L3Layer` and answers to the same
methods; its costs are in `l3paper.costs.accounting`.
"""

import torch
from torch import Tensor, nn

from l3paper.layer import L3Layer, rms_norm


class NoUp(L3Layer):
    """Without W_up: what was found is normalised and mixed as it is."""

    def __init__(self, n_embd, n_emb, d_up, *arguments, **options):
        super().__init__(n_embd, n_emb, d_up, *arguments, **options)
        del self.w_up
        self.w_mix = nn.Linear(self.d_emb + n_embd, n_embd, bias=False)
        self.reset_parameters()

    def projections(self) -> list[nn.Linear]:
        return [self.w_mix]

    def mix(self, found: Tensor, x: Tensor) -> Tensor:
        return self.w_mix(torch.cat([rms_norm(found), x], dim=-1))


class NoResidual(L3Layer):
    """Without the residual stream inside W_mix: the delta knows the context by the softmax alone."""

    def __init__(self, n_embd, n_emb, d_up, *arguments, **options):
        super().__init__(n_embd, n_emb, d_up, *arguments, **options)
        self.w_mix = nn.Linear(d_up, n_embd, bias=False)
        self.reset_parameters()

    def mix(self, found: Tensor, x: Tensor) -> Tensor:
        return self.w_mix(rms_norm(self.w_up(found)))


class NormalisedResidual(L3Layer):
    """The residual stream normalised before W_mix, as what was found is."""

    def mix(self, found: Tensor, x: Tensor) -> Tensor:
        return super().mix(found, rms_norm(x))


class ScaledSoftmax(L3Layer):
    """Scores divided by sqrt(n_embd), as in attention."""

    def query(self, x: Tensor) -> Tensor:
        return super().query(x) * self.n_embd**-0.5


class NormalisedKeys(L3Layer):
    """Keys of length 1, so that no row can win by its length; the values keep theirs."""

    def rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(keys) * self.n_embd**-0.5, values


class RandomStart(L3Layer):
    """W_mix starts like any other matrix, so the layer does something from the first step."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.w_mix.weight, std=self.w_mix.in_features**-0.5)


VARIANTS: dict[str, type[L3Layer]] = {
    "": L3Layer,
    "no-up": NoUp,
    "no-residual": NoResidual,
    "normalised-residual": NormalisedResidual,
    "scaled-softmax": ScaledSoftmax,
    "normalised-keys": NormalisedKeys,
    "random-start": RandomStart,
}
