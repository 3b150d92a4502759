"""Models and runs on disk."""

from l3paper.checkpoints.model import load_model, save_model

__all__ = ["load_model", "save_model"]
