"""One training run: its settings, its model, its processes, its evaluation."""
