"""Before a run: whether it fits, how long it takes, what to choose."""
