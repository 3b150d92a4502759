"""Muon for the matrices and AdamW for everything else, behind one optimizer's face.

AdamW is fused: one pass over a parameter and its two moments. A step touches a few rows of a table of
hundreds of thousands, yet AdamW must walk them all, for a row's momentum outlasts its gradient. To
update the touched rows only (as `torch.optim.SparseAdam`) is another algorithm, and slower than the
fused walk besides; `python -m l3paper.bench optimizer` shows it.
"""

import torch
from torch import nn
from torch.optim import AdamW, Muon

from l3paper.lookup.table import RowTable
from l3paper.parts.rivals import Engram

CONVOLUTION_LR = 0.01
"""For the convolutions of Engram layers, at width 768, as the routers' by default."""


def l3_param_groups(
    model: nn.Module, lr: float, table_lr: float, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups of any model that contains L3 layers, for an optimizer such as AdamW.

    The layers' tables learn at `table_lr` and without weight decay, which would shrink rows whose
    tokens are absent from a batch; all other parameters at `lr` and with `weight_decay`. Parameters
    that need no gradient are left out. Raises ValueError if no L3 layer has tables of its own.
    """
    layers = [module for module in model.modules() if isinstance(module, RowTable)]
    tables = {id(table) for layer in layers if layer.store is None for table in layer.tables()}
    if not tables:
        raise ValueError("model has no L3 tables: add an L3Layer, or use its parameters() as they are")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {
            "params": [parameter for parameter in trained if id(parameter) not in tables],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter for parameter in trained if id(parameter) in tables],
            "lr": table_lr,
            "weight_decay": 0.0,
        },
    ]


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` side by side; each parameter belongs to one.

    Its param_groups are those of the two, so learning-rate schedulers reach all of them.

    Args:
        matrices: the param group for Muon, whose parameters all have two dimensions.
        others: the param groups for AdamW.
    """

    def __init__(self, matrices: dict, others: list[dict]):
        self.muon = Muon([matrices], momentum=0.95)
        self.adamw = AdamW(others, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        super().__init__(self._groups(), defaults={})

    def _groups(self) -> list[dict]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self._groups()  # loading made new ones


def muon_adamw(model: nn.Module, matrix_lr: float, weight_decay: float, **rates: float) -> MuonAdamW:
    """One optimizer for a `l3paper.gpt.GPT`: its matrices under Muon, all else under AdamW.

    `rates` are AdamW's, of "embedding", "head", "table" and "router". They are for width 768 and scale
    with 1 / sqrt(width), as in nanochat; Muon's orthogonal updates keep their size at any width.
    """
    scale = (model.config.n_embd / 768) ** -0.5
    groups = {"embedding": [model.wte.weight], "head": [model.lm_head.weight]}
    routers, matrices, tables, convolutions = [], [], [], []
    for name, parameter in model.blocks.named_parameters():
        (routers if name.endswith("router.weight") else matrices).append(parameter)
    for layer in (*model.l3_layers.values(), *model.rivals.values()):
        tables += dict.fromkeys(layer.tables())  # once, if keys and values are tied
        matrices += [linear.weight for linear in layer.projections()]
        convolutions += [layer.convolution] if isinstance(layer, Engram) else []
    groups |= {"router": routers, "table": tables, "convolution": convolutions}
    rates["convolution"] = CONVOLUTION_LR
    return MuonAdamW(
        {"name": "matrix", "params": matrices, "lr": matrix_lr, "weight_decay": weight_decay},
        [dict(name=name, params=ps, lr=rates[name] * scale) for name, ps in groups.items() if ps],
    )
