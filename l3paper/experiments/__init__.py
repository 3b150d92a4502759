"""Recorded comparisons: what is compared, how, and what it says of the paper's claims."""
