"""Many runs of one command: `python -m launch -m key=a,b ...`, a search by Optuna, and W&B sweeps."""
