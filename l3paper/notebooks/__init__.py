"""What the notebooks need: one figure style, and their execution."""

from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
"""The notebooks of a checkout; an installed package has none."""
