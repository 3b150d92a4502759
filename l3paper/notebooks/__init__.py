"""What the notebooks need: one figure style, and their execution."""
