"""The first weights: a pure function of (seed, parameter name), one parameter at a time.

So they are the same for every engine, precision and number of ranks, and no rank ever holds the whole model in fp32
for them.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from trainer.engine.base import BuildModel, Engine
from trainer.errors import CheckpointError
from trainer.pretrained import Weights


def initialise(engine: Engine, build_model: BuildModel, seed: int, weights: Weights | None = None) -> None:
    """Write the first masters into `engine` through its fragments, and let the working parameters follow.

    build_model: builds the model's twin on the meta device; one parameter of it at a time gets storage, is filled by
    the model's `reset_parameter`, and is given back. weights: those to begin with, as far as it has them.
    """
    with torch.device("meta"):
        twin: Any = build_model()
    generator = torch.Generator()
    current, values = "", torch.empty(0)
    for fragment in engine.fragments():
        if fragment.key != "master":
            continue
        if fragment.parameter != current:
            current = fragment.parameter
            given = None if weights is None else weights.values(current)
            values = _fill(twin, current, generator, seed) if given is None else given
        fragment.fill(values)
    engine.after_load(engine.scalars())


def fill_frozen(engine: Engine, weights: Weights) -> None:
    """Write the parameters that are not trained. Raises CheckpointError for one that `weights` does not have."""
    current, values = "", torch.empty(0)
    for fragment in engine.frozen():
        if fragment.parameter != current:
            current, values = fragment.parameter, frozen_values(weights, fragment.parameter)
        fragment.fill(values)
    engine.after_load(engine.scalars())


def frozen_values(weights: Weights, name: str) -> torch.Tensor:
    """The values of a parameter that is not trained, which must be there."""
    values = weights.values(name)
    if values is None:
        raise CheckpointError(f"{name} is not trained, and the weights to begin with do not have it.")
    return values


def _fill(twin: Any, name: str, generator: torch.Generator, seed: int) -> torch.Tensor:
    """The flattened first values of one parameter, fp32, on the CPU."""
    module_name, _, leaf = name.rpartition(".")
    module = twin.get_submodule(module_name)
    blank = module._parameters[leaf]
    module._parameters[leaf] = torch.nn.Parameter(torch.empty(blank.shape, device="cpu", dtype=torch.float32))
    generator.manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    twin.reset_parameter(name, generator)
    values: torch.Tensor = module._parameters[leaf].detach().flatten()
    module._parameters[leaf] = blank
    return values
