"""Weights & Biases as a view of a run: the sink (`sink.py`), and what commands tell that use one (`lineage.py`).

Nothing here can hold up a step: the sink puts what it is given into a queue, and a thread brings it to W&B's own
process, which uploads it. `client.py` is the only importer of `wandb`.
"""

from trainer.metrics.wandb.client import choose_mode, default_entity
from trainer.metrics.wandb.sink import WandbSink

__all__ = ["WandbSink", "choose_mode", "default_entity"]
