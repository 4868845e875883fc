"""First weights that others trained: `init_from=hf:PATH` (a folder of transformers, or a name on the hub) and
`init_from=run:NAME` (another run), read one parameter at a time."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from trainer.checkpoint.load import Reader, find
from trainer.config import Config
from trainer.data.opus import is_pair, vocabulary
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import CheckpointError, ConfigError
from trainer.formats import Tensor
from trainer.run_directory import RunDirectory

Shapes = Mapping[str, torch.Size]
"""Of all parameters of a model, by name."""


class Weights(Protocol):
    """First weights for a model."""

    def values(self, name: str) -> torch.Tensor | None:
        """The flattened values of the parameter, fp32; None where it has to begin anew."""


def first_weights(
    config: Config, twin: torch.nn.Module, tokenizer: Tokenizer | None = None, start_id: int | None = None
) -> Weights | None:
    """The weights that a run begins with, if it does not begin at random: those of `init_from`, else those that the
    model itself names (`HFModel`). twin: the model on the meta device. The rest, and what is raised: `open_weights`."""
    init_from = config.init_from or getattr(twin, "init_from", None)
    if init_from is None:
        return None
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    return open_weights(init_from, config.runs_dir, config.model, shapes, tokenizer, start_id)


def open_weights(
    init_from: str,
    runs_dir: str,
    model: Mapping[str, Any],
    shapes: Shapes,
    tokenizer: Tokenizer | None = None,
    start_id: int | None = None,
) -> Weights:
    """What `init_from` names, checked against the parameters of the configuration's `model` before anything is read.

    tokenizer: the run's; start_id: what its task begins targets with, None = nothing of its own. Raises ConfigError for
    a place that is none, and, at once, a model that is another and a tokenizer of another vocabulary (or another begin
    of targets); CheckpointError for tensors that are missing, too many or of another shape: all of them are listed.
    """
    kind, _, place = init_from.partition(":")
    if kind == "hf" and place:
        folder = _folder(place)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json, so nothing says which model its weights are of.")
        problems = [] if model["_target_"].endswith(".HFModel") else _model_problems(folder, model)  # is the folder's
        size = _json(folder / "config.json").get("vocab_size")
        problems += _tokenizer_problems(folder, tokenizer, size) or _start_problems(folder, tokenizer, start_id)
        if problems:
            raise ConfigError(*problems)
        return _HubWeights(folder, model, shapes)
    if kind == "run" and place:
        run = RunDirectory.existing(place, runs_dir, f"init_from={init_from}").path
        problems = _tokenizer_problems(run, tokenizer, model.get("vocab_size"))
        if problems:
            raise ConfigError(*problems)
        return _RunWeights(run, shapes)
    raise ConfigError(f"init_from={init_from} names no weights; use hf:FOLDER, hf:ORG/NAME or run:NAME.")


def _folder(place: str) -> Path:
    """The folder of a checkpoint, fetched from the hub if `place` is none on this disk."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or place.count("/") > 1 or place.startswith("."):
        raise ConfigError(f"init_from=hf:{place}: there is no such folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.spm"]
        return Path(snapshot_download(place, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"init_from=hf:{place} is no folder here, and could not be fetched from the hub:"
            f" {str(error).splitlines()[0]}"
        ) from error


class _RunWeights:
    """The newest checkpoint of another run."""

    def __init__(self, run: Path, shapes: Shapes) -> None:
        checkpoint = find(run / "checkpoints", "latest")
        self._reader = Reader(checkpoint)
        with ExitStack() as stack:
            stack.enter_context(self._reader)
            saved = {name: torch.Size(shape) for (name, key), shape in self._reader.shapes.items() if key == "master"}
            _check(checkpoint.folder, saved, {name: list(shape) for name, shape in shapes.items()})
            stack.pop_all()

    def values(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        values = torch.empty(torch.Size(self._reader.shapes[name, "master"]).numel())
        self._reader.read_into(name, "master", 0, values)
        return values


class _HubWeights:
    """A folder with config.json and safetensors."""

    def __init__(self, folder: Path, model: Mapping[str, Any], shapes: Shapes) -> None:
        from trainer.formats.catalogue import format_of

        self._folder = folder
        self._form = format_of(model, None)
        self._files = _files(folder)
        self._pieces: dict[str, list[Tensor]] = {}
        for one in self._form.tensors:
            self._pieces.setdefault(one.ours, []).append(one)
        self._shapes = shapes
        self._check()

    def _check(self) -> None:
        """All tensors are there in their shapes, and no other."""
        found: dict[str, torch.Size] = {}
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                found |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {
            self._name(one) or one.theirs: _their_shape(one, self._shapes[one.ours])
            for one in self._form.tensors
            if self._name(one) is not None or one.ours not in self._form.fresh
        }
        constants = {self._stored(name): value().shape for name, value in self._form.constants.items()}
        wanted |= {name: list(shape) for name, shape in constants.items()}
        prefix = self._form.prefix
        known = {*self._form.twins, *(name.removeprefix(prefix) for name in self._form.twins)}
        _check(self._folder, found, wanted, [*map(re.escape, known), *self._form.ignored])
        self._check_constants()

    def _check_constants(self) -> None:
        """What our model computes is what they have, but for rounding to 16 bits."""
        for name, value in self._form.constants.items():
            stored = self._stored(name)
            with _opened(self._files[stored]) as file:
                difference = float((file.get_tensor(stored).float() - value()).abs().max())
            if not difference <= _ROUNDING:
                raise CheckpointError(
                    f"{self._folder}: {stored} differs by up to {difference:.2g} from the values that our model"
                    " computes for it, so it was trained; train it with model=hf."
                )

    def _stored(self, name: str) -> str:
        """The name of their tensor in these files, which may lack the prefix."""
        return name if name in self._files else name.removeprefix(self._form.prefix)

    def _name(self, one: Tensor) -> str | None:
        """What their tensor is called in these files: by its name, without the prefix, or as a twin of it."""
        twins = [name for name, same in self._form.twins.items() if same == one.theirs]
        for name in (one.theirs, one.theirs.removeprefix(self._form.prefix), *twins):
            if name in self._files:
                return name
        return None

    def values(self, name: str) -> torch.Tensor | None:
        """See `Weights`."""
        parts: list[torch.Tensor] = []
        for one in self._pieces.get(name, ()):  # adapters are in no folder
            theirs = self._name(one)
            if theirs is None:  # checked: a parameter that may begin anew
                return None
            with _opened(self._files[theirs]) as file:
                value = file.get_tensor(theirs).float()
            value = value[0] if one.as_row else value.t() if one.transposed else value
            parts.append(value[one.skip :])
        return torch.cat(parts).flatten() if parts else None


def _their_shape(one: Tensor, whole: torch.Size) -> list[int]:
    rows, *rest = whole
    shape = [one.skip + min(rows, one.end or rows) - one.begin, *rest]
    return [1, *shape] if one.as_row else shape[::-1] if one.transposed else shape


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict) or not all(str(file) == Path(str(file)).name for file in places.values()):
            raise CheckpointError(f"{index} has no weight_map from names to files of its folder.")
        return {name: folder / file for name, file in places.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} has no model.safetensors, and no index of several; it has {there}.")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no mapping.")
    return value


_ROUNDING = 0.01
"""By how much a table of sines and cosines may differ: bfloat16 has 0.004 around 1."""

_FREE_TO_CHOOSE = re.compile(r"dropout|init_std|max_positions|num_classes|head$")
"""Arguments of a model that do not belong to its weights."""


def _model_problems(folder: Path, model: Mapping[str, Any]) -> list[str]:
    """Where the configuration's model is another than the folder's: the words that would make it the same.

    Raises CheckpointError for a config.json that does not say all, ConfigError for a model that ours cannot be.
    """
    path = folder / "config.json"
    try:
        from trainer.formats.catalogue import part_of  # imports every model

        theirs = part_of(_json(path))
    except KeyError as error:
        raise CheckpointError(f"{path} does not say {error.args[0]}, which its model_type needs.") from error
    differing = {
        key: value
        for key, value in theirs.items()
        if not _FREE_TO_CHOOSE.search(key) and model.get(key, value) != value and _matters(model, key, value)
    }
    words = " ".join(f"model.{key}={_in_yaml(value)}" for key, value in differing.items())
    return [f"init_from: {folder} is of another model than the configuration's; set {words}."] if differing else []


def _tokenizer_problems(folder: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[str]:
    """Where the folder's tokenizer gives other ids than the run's. Raises DataError for one that is damaged."""
    path = folder / "tokenizer.json"
    if tokenizer is None or not (path.is_file() or is_pair(folder)):
        return []
    path, theirs = (folder, vocabulary(folder)) if is_pair(folder) else (path, load_tokenizer(path).entries())
    ours = tokenizer.entries()
    differing = [name for name in sorted(theirs, key=theirs.__getitem__) if ours.get(name) != theirs[name]]
    if not differing and len(ours) == len(theirs):
        return []
    example = f", such as {differing[0]!r}" if differing else ""
    return [
        f"init_from: {path} has another vocabulary than the run's tokenizer ({len(theirs)} entries, the run's"
        f" {len(ours)}; {len(differing)} have another id there, or none{example}), and weights follow ids;"
        f" set tokenizer=file tokenizer.path={path} tokenizer.vocab_size={vocab_size or len(theirs)}."
    ]


def _start_problems(folder: Path, tokenizer: Tokenizer | None, start_id: int | None) -> list[str]:
    """Where the run begins targets with another token than the weights know; told by the tokenizer they share."""
    if tokenizer is None or start_id is None or not ((folder / "tokenizer.json").is_file() or is_pair(folder)):
        return []
    files = [_json(path) for name in ("generation_config.json", "config.json") if (path := folder / name).is_file()]
    told = next((value for file in files if (value := file.get("decoder_start_token_id")) is not None), None)
    if told == start_id or not isinstance(told, int):
        return []
    name = tokenizer.token_of(told)
    cure = f"task.start_token='\"{name}\"'"
    if name == "<|startoftranscript|>":
        cure = f'task.prompt=["{name}","<|LANGUAGE|>","<|transcribe|>","<|notimestamps|>"] with a language such as en'
    return [
        f"init_from: {folder} begins its targets with {name} (decoder_start_token_id={told}),"
        f" the task with {tokenizer.token_of(start_id)}; set {cure}."
    ]


def _matters(model: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether another value makes it another model: null may stand for what a number says."""
    try:
        from trainer.formats.catalogue import format_of

        one, other = format_of({**model, key: value}, None), format_of(model, None)
        return (one.config, one.tensors) != (other.config, other.tensors)
    except ConfigError:  # the model has no counterpart, so neither is known to be the same
        return True


def _in_yaml(value: Any) -> str:
    """A value as a word of the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_yaml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _check(place: Path, found: Shapes, wanted: Mapping[str, list[int]], ignored: Sequence[str] = ()) -> None:
    problems = []
    for name, shape in wanted.items():
        if name not in found:
            near = difflib.get_close_matches(name, set(found) - set(wanted), 1)
            problems.append(f"{name} is missing" + (f" (the nearest there is {near[0]})" if near else ""))
        elif list(found[name]) != shape:
            problems.append(f"{name} is {list(found[name])}, not {shape}")
    for name in found:
        if name not in wanted and not any(re.search(pattern, name) for pattern in ignored):
            problems.append(f"{name} has no place in the model")
    if problems:
        raise CheckpointError(f"{place} does not fit the model: {'; '.join(problems)}.")
