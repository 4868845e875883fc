"""Guards: what keeps a run from losing work when the world interferes."""
