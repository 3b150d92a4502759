"""Where models compute, and how precisely."""

import torch
from torch import nn


def pick_device(name: str) -> torch.device:
    """The torch device for "cpu", "cuda" or "auto"; ValueError for others and where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; choose cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def precision(model: nn.Module) -> torch.autocast:
    """The context a model computes in: bfloat16 on CUDA, its own precision elsewhere."""
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
