"""Engines: the trainer knows *when*, the engine knows *how*.

`plain.py` is PyTorch alone, `zero.py` is DeepSpeed ZeRO (its only importer), `ds_config.py` writes DeepSpeed's JSON
from the plan.
"""
