"""What our models are called elsewhere: `catalogue` finds the counterpart in transformers of a model of ours, and the
model of ours for a config.json of theirs; one file per family says how configurations and tensors correspond.

A family's file has:

* `MODEL_TYPES`: the `model_type`s of config.json that it reads;
* `obstacles(given) -> list[str]`: what, in the arguments of our model, it has otherwise ("model.norm=layer (T5: rms)");
  empty: it is the counterpart;
* `describe(given) -> Format`: of a model without obstacles;
* `adopt(config) -> dict`: the arguments of our model, with `_target_`, for a config.json. Raises ConfigError, naming
  the keys of what our model does not have.

`given` has every argument of the model's class, defaults included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROCESSOR = "preprocessor_config.json"
"""The file of a folder that says what makes images or recordings into what its model takes."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One of their tensors: rows [begin, end) of one of our parameters; end None = to its last.

    skip: so many first rows of theirs that ours has not (written as zeros). transposed: theirs is [in, out]. as_row:
    theirs is [1, n], ours [n].
    """

    theirs: str
    ours: str
    begin: int = 0
    end: int | None = None
    skip: int = 0
    transposed: bool = False
    as_row: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """architecture: the class in transformers; config: its config.json; tensors: in the order of our parameters;
    between_ends: whether its texts are read between a begin and an end token, which their tokenizer has to add.

    For reading what others wrote: prefix: of names, which a checkpoint of the bare model has not ("bert."); twins:
    other names of a tensor (tied weights: {"lm_head.weight": "model.embed_tokens.weight"}); ignored: regular
    expressions of tensors that are no weights; fresh: those of our parameters that may be missing (a new head).
    constants: tensors of theirs that ours computes (a table of positions), by name: a function of no arguments that
    gives the values. They are written, and what is read has to equal them. files: more JSON files of the folder.
    """

    architecture: str
    config: Mapping[str, Any]
    tensors: Sequence[Tensor]
    prefix: str = ""
    twins: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    fresh: Sequence[str] = ()
    constants: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    between_ends: bool = False


def unlike(given: Mapping[str, Any], wanted: Mapping[str, Any], family: str) -> list[str]:
    """Obstacles: what `given` has otherwise than a family wants it."""
    return [f"model.{key}={given[key]} ({family}: {value})" for key, value in wanted.items() if given[key] != value]
