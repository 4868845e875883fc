"""The JSON files of a checkpoint, believed in nothing: whatever stands in them, it is data, and names no file outside
their folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from trainer.build import fits
from trainer.checkpoint import FORMAT
from trainer.errors import CheckpointError
from trainer.state import TrainState

MANIFEST, STATE = "manifest.json", "state.json"

T = TypeVar("T")


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """A manifest, whose `files` are names within its folder with `bytes` and `sha256`.

    place: path or URL, for messages. Raises CheckpointError where it is none.
    """
    manifest = _object(content, place)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{place}: format {_short(manifest.get('format'))} is not {FORMAT}; use the version that wrote it."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{place} has no list of files as a save writes it; it is damaged.")
    for name in files:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name == MANIFEST:
            raise CheckpointError(f"{place} lists {_short(name)}, which is no file of its folder; it is damaged.")
    return manifest


def parse_state(content: bytes, place: str) -> tuple[TrainState, dict[str, float], dict[int, Mapping[str, Any]]]:
    """(state, scalars of the optimizer, positions of lanes) of a state.json.

    place: as above. Raises CheckpointError where a value is missing or of another type than a save writes.
    """
    found = _object(content, place)
    train, scalars, lanes = (_part(found, key, place) for key in ("train", "optimizer", "lanes"))
    state = _attempt(lambda: TrainState.from_dict(train), place)
    wrong = [key for key, hint in get_type_hints(TrainState).items() if not fits(getattr(state, key), hint)]
    wrong += [key for key, value in scalars.items() if not fits(value, float)]
    wrong += [f"lane {_short(lane)}" for lane, position in lanes.items() if not isinstance(position, dict)]
    if wrong or state.step < 0:
        raise CheckpointError(f"{place}: not as a save writes it: {', '.join(wrong or ['step'])}; it is damaged.")
    return state, scalars, _attempt(lambda: {int(lane): position for lane, position in lanes.items()}, place)


def _object(content: bytes, place: str) -> dict[str, Any]:
    found = _attempt(lambda: json.loads(content.decode(), parse_int=_int64), place)
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} holds no JSON object; it is damaged.")
    return found


def _part(found: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    part = found.get(key)
    if not isinstance(part, dict):
        raise CheckpointError(f"{place} has no mapping {key}; it is damaged.")
    return part


def _attempt(action: Callable[[], T], place: str) -> T:
    try:
        return action()
    except RecursionError:
        raise CheckpointError(f"{place} is nested too deep; it is damaged.") from None
    except (ValueError, TypeError) as error:  # no JSON, not even UTF-8, or JSON of another kind
        raise CheckpointError(f"{place} is not JSON as a save writes it ({error}); it is damaged.") from None


def _int64(digits: str) -> int:
    """A number that counts something. Raises ValueError for what only Python could hold."""
    if len(digits) > 18:
        raise ValueError(f"{digits[:18]}... is too large")
    return int(digits)


def _is_entry(facts: Any) -> bool:
    return isinstance(facts, dict) and fits(facts.get("bytes"), int) and fits(facts.get("sha256"), str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
