"""Checkers of notebook 06."""

import math

import numpy as np
import torch

from l3paper import L3Layer, allocation_to_bounds
from l3paper.experiments.statistics import over_seeds


def check_1(answer):
    """answer(gaps) is the half width of Student's 95 % interval of three differences."""
    for gaps in ([0.01, 0.02, 0.03], [0.3, -0.1, 0.2]):
        expected = over_seeds(gaps).half_width()
        assert math.isclose(answer(gaps), expected, rel_tol=1e-3), f"wrong for {gaps}: divide by n - 1?"


def check_2(answer):
    """answer(layer, x, ids) is what a tied layer would return if all scores were zero."""
    torch.manual_seed(2)
    layer = L3Layer(n_embd=8, n_emb=6, d_up=12, bounds=allocation_to_bounds([2, 3, 1])).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, ids = torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([[0, 1, 2], [1, 1, 0]])
    found, single = answer(layer, x, ids), ids == 2
    assert torch.allclose(found[single], layer(x, ids)[single]), "with one row nothing can change"
    averaged = [layer.kv_weight[a:b].mean(0) for a, b in ((0, 2), (2, 5), (5, 6))]
    up = layer.w_up(torch.stack(averaged)[ids])
    up = torch.nn.functional.rms_norm(up, up.shape[-1:])
    expected = layer.w_mix(torch.cat([up, x], dim=-1))
    assert torch.allclose(found, expected), "every row of a token must weigh the same"


def check_3(answer):
    """answer(tokens, gains) is the number of tokens at which a fitted line is at zero."""
    at = np.array([1e6, 2e6, 4e6])
    for slope, zero in ((0.01, 3e6), (0.02, 9e9)):
        found = answer(at, slope * np.log(at / zero))
        assert np.isclose(found, zero), f"{found:.3g}: is the line over the logarithm of the tokens?"
