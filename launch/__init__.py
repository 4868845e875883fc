"""Launchers: the same experiment, taken to every place it can run."""
