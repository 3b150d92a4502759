"""Checkers of notebook 08."""

import math

import torch

from l3paper.insight.record import lens_drops


def check_1(answer):
    """answer(weights) is the inverse of the probability that two draws give the same row."""
    for weights in ([0.25] * 4, [1.0, 0.0], [0.5, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]):
        expected = 1 / sum(w**2 for w in weights)
        found = float(answer(torch.tensor(weights)))
        assert math.isclose(found, expected, rel_tol=1e-5), (
            f"{weights} should give {expected:.3f}, not {found:.3f}"
        )


def check_2(answer):
    """answer(weights) is the mutual information of row and context for weights (contexts, rows)."""
    made_up = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    mean = made_up.mean(dim=0)
    expected = float((made_up * (made_up / mean).log()).sum(dim=-1).mean())
    found = float(answer(made_up))
    assert math.isclose(found, expected, rel_tol=1e-3), (
        f"random weights give {expected:.4f} nats, not {found:.4f}: which of the entropies is larger?"
    )
    certain = float(answer(torch.eye(4)))
    assert math.isclose(certain, math.log(4), rel_tol=1e-5), (
        "four contexts with a row each give log 4; is 0 log 0 taken care of?"
    )


def check_3(answer, loss_with, weights, token_ids, before):
    """answer(weights, token_ids) gives the softmaxes of every token to other positions of the token."""
    generator = torch.Generator().manual_seed(0)
    made_up = torch.randn(60, 4, generator=generator).softmax(dim=-1)
    ids = torch.arange(60) % 3
    swapped = answer(made_up.clone(), ids)
    assert swapped.shape == made_up.shape, "one softmax per position, as before"
    whole = {tuple(row) for row in made_up.tolist()}
    assert {tuple(row) for row in swapped.tolist()} <= whole, "every softmax must stay as it is"
    for token in range(3):
        ours, theirs = (w[ids == token].sort(dim=0).values for w in (made_up, swapped))
        assert torch.equal(ours, theirs), "each token must keep its own softmaxes, and so its mean"
    moved = float((swapped != made_up).any(dim=1).float().mean())
    assert moved > 0.8, f"only {moved:.0%} of the positions have another softmax than before"
    cost = loss_with(answer(weights, token_ids)) - before
    print(f"with another context's softmax: {cost:+.4f} nats per token")


def check_4(answer):
    """answer(lens, controls) is the L3 depth with the largest lead over the controls, and the lead."""
    order = ["embedding", "block 0", "{} after 0", "block 1", "{} after 1"]

    def made_up(kind, *nats):
        return dict(zip((depth.format(kind) for depth in order), nats, strict=True))

    lens = made_up("L3", 10.0, 9.0, 5.0, 3.0, 0.0)  # drops of 4 and 3
    controls = [made_up("mlp", 10.0, 8.0, 4.5, 1.0, 0.0), made_up("ple", 9.0, 8.0, 6.0, 2.0, 0.5)]
    assert lens_drops({"lens": lens})["L3 after 0"] == 4
    depth, lead = answer(lens, controls)
    assert depth != "L3 after 0", "its drop is the largest, but look what the controls do in its place"
    assert depth == "L3 after 1", f"{depth!r} is not an L3 depth, or not the right one"
    assert math.isclose(lead, 1.5), f"the lead is over the best control, 1.5 nats, not {lead}"
