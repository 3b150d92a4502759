"""A tuned lens: what each depth of a model already knows of its final answer."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from l3paper.gpt import GPT
from l3paper.layer import rms_norm


def streams(model: GPT, idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The residual stream (B, T, C) of ids (B, T) at every depth, by name, and the final one.

    Names are "embedding", "block 0", "L3 after 0" (where there is one), "block 1" and so on; the final
    stream is normalised, as the head takes it.
    """
    found: dict[str, Tensor] = {}

    def note(name):
        return lambda module, inputs, output: found.__setitem__(name, output)

    def note_l3(i):
        def add(module, inputs, output):
            found[f"L3 after {i}"] = found[f"block {i}"] + output

        return add

    hooks = [
        model.blocks[0].register_forward_pre_hook(
            lambda module, inputs: found.__setitem__("embedding", inputs[0])
        )
    ]
    for i, block in enumerate(model.blocks):
        hooks.append(block.register_forward_hook(note(f"block {i}")))
        if str(i) in model.l3_layers:
            hooks.append(model.l3_layers[str(i)].register_forward_hook(note_l3(i)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not see new hooks
            final = model.hidden_states(idx.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found, final


class TunedLens(nn.Module):
    """An affine probe for every depth of a model that foretells its final distribution.

    After Belrose et al. (2023, https://arxiv.org/abs/2303.08112): the probe maps a stream to one that
    the model's own norm and head read. Probes begin as the identity, which is the logit lens.
    """

    def __init__(self, model: GPT, names: list[str]):
        super().__init__()
        self.model = [model]  # in a list, so that its parameters are not the lens's
        width = model.config.n_embd
        self.probes = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        for probe in self.probes.values():
            nn.init.eye_(probe.weight)
            nn.init.zeros_(probe.bias)

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        """KL(final || probe) in nats (B, T) by depth, for ids (B, T)."""
        (model,) = self.model
        with torch.no_grad():
            found, final = streams(model, idx)
            target = model.logits(final).log_softmax(dim=-1)  # (B, T, vocab_size)
        divergence = {}
        for name, probe in self.probes.items():
            guess = model.logits(rms_norm(probe(found[name]))).log_softmax(dim=-1)
            divergence[name] = F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
        return divergence


def train_lens(
    model: GPT, batches: Iterator[Tensor], steps: int, lr: float = 0.003, show_progress: bool = False
) -> TunedLens:
    """A lens for `model`, whose weights stay as they are, trained on `steps` batches of ids (B, T)."""
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    first = next(batches)
    lens = TunedLens(model, list(streams(model, first)[0])).to(model.device)
    optimizer = torch.optim.Adam(lens.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    idx = first
    for _ in tqdm(range(steps), disable=not show_progress, desc="lens"):
        sum(kl.mean() for kl in lens(idx).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        idx = next(batches)
    for parameter, flag in frozen.items():
        parameter.requires_grad_(flag)
    return lens
