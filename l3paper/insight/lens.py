"""A tuned lens: what each depth of a model already knows of its final answer."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from l3paper.gpt import GPT
from l3paper.layer import rms_norm


def depths(model: GPT) -> list[str]:
    """The names of the model's depths: "embedding", "block 0", "L3 after 0" (if there is one), ...

    A rival in the place of an L3 layer gives its depth its own name, such as "mlp after 0".
    """
    names, c = ["embedding"], model.config
    for i in range(len(model.blocks)):
        names.append(f"block {i}")
        names += [f"L3 after {i}"] * (i in c.l3_blocks) + [f"{c.rival} after {i}"] * (
            i in c.rival_blocks
        )
    return names


def streams(model: GPT, idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The residual stream (B, T, C) of ids (B, T) at every depth, by name, and the final one.

    The final stream is normalised, as the head takes it.
    """
    by_depth: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        keep_input = partial(_keep_input, by_depth, "embedding")
        hooks.enter_context(model.blocks[0].register_forward_pre_hook(keep_input))
        for i, block in enumerate(model.blocks):
            keep_output = partial(_keep_output, by_depth, f"block {i}")
            hooks.enter_context(block.register_forward_hook(keep_output))
        for kind, layers in (("L3", model.l3_layers), (model.config.rival, model.rivals)):
            for i, layer in layers.items():
                keep_sum = partial(_keep_sum, by_depth, f"{kind} after {i}")
                hooks.enter_context(layer.register_forward_hook(keep_sum))
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not see new hooks
            final = model.hidden_states(idx.to(model.device))
    return by_depth, final


def _keep_input(by_depth, name, module, inputs):
    by_depth[name] = inputs[0]


def _keep_output(by_depth, name, module, inputs, output):
    by_depth[name] = output


def _keep_sum(by_depth, name, module, inputs, output):
    by_depth[name] = inputs[0] + output


class TunedLens(nn.Module):
    """An affine probe for every depth of a model, which predicts the model's final distribution.

    After Belrose et al. (2023, https://arxiv.org/abs/2303.08112): the probe maps a stream to one that
    the model's own norm and head read. Probes start as the identity, which is the logit lens.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = [model]  # in a list, so that its parameters are not the lens's
        width = model.config.n_embd
        self.probes = nn.ModuleDict({name: nn.Linear(width, width) for name in depths(model)})
        for probe in self.probes.values():
            nn.init.eye_(probe.weight)
            nn.init.zeros_(probe.bias)
        self.to(model.device)

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        """KL(final || probe) in nats (B, T) by depth, for ids (B, T)."""
        (model,) = self.model
        with torch.no_grad():
            by_depth, final = streams(model, idx)
            target = model.logits(final).log_softmax(dim=-1)  # (B, T, vocab_size)
        divergence = {}
        for name, probe in self.probes.items():
            guess = model.logits(rms_norm(probe(by_depth[name]))).log_softmax(dim=-1)
            divergence[name] = F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
        return divergence


def train_lens(
    model: GPT, batches: Iterator[Tensor], steps: int, lr: float = 0.003, show_progress: bool = False
) -> TunedLens:
    """Train a lens on `steps` batches of ids (B, T). The model's weights stay as they are."""
    lens = TunedLens(model)
    probes = list(lens.parameters())
    optimizer = torch.optim.Adam(probes, lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for idx in tqdm(islice(batches, steps), total=steps, disable=not show_progress, desc="lens"):
        sum(divergence.mean() for divergence in lens(idx).values()).backward(inputs=probes)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return lens
