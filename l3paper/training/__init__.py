"""One training run: its settings, its model, its processes, its evaluation."""

from l3paper.training.config import PRESETS, TrainConfig, preset_name

__all__ = ["PRESETS", "TrainConfig", "preset_name"]
