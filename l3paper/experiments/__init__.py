"""Recorded comparisons: what is compared, how, and what the records say about the paper's claims."""
