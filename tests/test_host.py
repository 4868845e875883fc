"""What the host's libraries are told."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

MANY_SHAPES = """
from trainer.host import keep_compiled_products
keep_compiled_products()
import torch
for _ in range(2):
    for rows in range(1, 1501):
        torch.mm(torch.ones(rows, 8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16))
"""


def test_products_of_many_shapes_are_compiled_once():
    """oneDNN by itself keeps 1,024; on a machine for which it has no bf16 it says nothing."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create", "PYTHONPATH": str(ROOT)}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES], env=environment, capture_output=True, text=True, check=True
    )
    made = [line for line in done.stdout.splitlines() if "create:cache_" in line]
    assert sum("cache_miss" in line for line in made) <= 1500
    assert not made or any("cache_hit" in line for line in made)
