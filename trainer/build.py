"""The only place that resolves `_target_`: a part of the configuration becomes an object.

Arguments are checked against the target's signature before anything is built, so every mistake in every part is known
before data are read or an accelerator is touched.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING

from trainer.config import PARTS, Config
from trainer.errors import ConfigError, UserError
from trainer.wording import describe, did_you_mean

PREFIXES = ("trainer.", "torch.optim.")
"""What `_target_` may name without being listed in `allow_targets`."""

RUNTIME_ARGUMENTS = {"task": ("tokenizer",), "optimizer": ("params",), "schedule": ("total",)}
"""Arguments that the trainer itself gives to the targets of parts."""


def build(part: Mapping[str, Any], key: str, **runtime: Any) -> Any:
    """Call the target of `part` with the part's arguments and `runtime`; `key` is the part's place, for messages.

    Raises ConfigError for a target that does not exist, arguments that do not fit it, or values that it refuses by
    ValueError. Whether the target's prefix is allowed is `check_parts`'s question.
    """
    problems = check(part, key, tuple(runtime))
    if problems:
        raise ConfigError(*problems)
    try:
        return _resolve(part["_target_"], key)(**_arguments(part), **runtime)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {part['_target_']} refuses its arguments: {error}.") from error


def check(part: Mapping[str, Any], key: str, runtime_names: Collection[str]) -> list[str]:
    """Every reason why `build` would not get as far as calling the target; nothing is called."""
    try:
        target = _resolve(part["_target_"], key)
    except ConfigError as error:
        return list(error.problems)
    given = _arguments(part)
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    free = [name for name in named if name not in runtime_names]
    problems = []
    for name, value in given.items():
        if name in runtime_names:
            problems.append(f"{key}.{name}={value!r} is given by the trainer; remove it.")
        elif name not in named and not open_ended:
            known = f" Its arguments: {', '.join(free) or 'none'}."
            problems.append(
                f"{key}.{name} is no argument of {part['_target_']}{_full_stop(did_you_mean(name, free), key)}{known}"
            )
        elif name in named and value != MISSING and not fits(value, hint := _hint(named[name], target)):
            problems.append(f"{key}.{name}={value!r} is not {describe(hint)}, as {part['_target_']} wants.")
    problems += [
        f"{key}.{name} is missing: {part['_target_']} needs it; write it in the YAML file, or +{key}.{name}=..."
        for name in free
        if name not in given and named[name].default is inspect.Parameter.empty
    ]
    return problems


def check_parts(config: Config) -> None:
    """Check every part of `config` against its target. Raises one ConfigError with all problems."""
    problems = part_problems({key: getattr(config, key) for key in (*PARTS, "logging", "allow_targets")})
    if problems:
        raise ConfigError(*problems)


def part_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the parts in the top level of a configuration, as far as it is there."""
    parts: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [
        (key, _given(key, values[key]), RUNTIME_ARGUMENTS.get(key, ())) for key in PARTS if values.get(key)
    ]
    parts += [(f"logging.{name}", sink, ()) for name, sink in values.get("logging", {}).items()]
    parts += _parts_of_data(values.get("data") or {}, values.get("task") or {})
    allowed = values.get("allow_targets", ())
    return [
        problem
        for key, part, runtime in parts
        for problem in (_forbidden(part.get("_target_"), key, allowed) or check(part, key, runtime))
    ]


def with_defaults(old: Config, new: Config) -> Config:
    """`old` with the defaults of arguments that a part did not have yet when it was written, so that a run goes on in a
    later version. Only parts of the same class as in `new`, whose classes are known to be allowed."""
    completed = {}
    for key in PARTS:
        part, now = getattr(old, key), getattr(new, key)
        if part and now and part["_target_"] == now["_target_"] and set(now) - set(part):
            known = inspect.signature(_resolve(part["_target_"], key)).parameters
            later = {name: known[name].default for name in now if name in known and name not in part}
            completed[key] = part | {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in later.items()
                if value is not inspect.Parameter.empty
            }
    return replace(old, **completed)


def _parts_of_data(
    data: Mapping[str, Any], task: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any], tuple[str, ...]]]:
    """The parts within `data`: stages, sources of other code, and the task as each source changes it. What is no
    mapping there is refused as an argument of `data`."""
    stages, sources = data.get("stages"), data.get("sources")
    listed = enumerate(stages) if isinstance(stages, list) else ()
    named = sources.items() if isinstance(sources, Mapping) else ()
    parts: list[tuple[str, Any, tuple[str, ...]]] = [(f"data.stages.{index}", stage, ()) for index, stage in listed]
    parts.append(("data.source", data.get("source"), ("split",)))
    for name, given in named:
        if isinstance(given, Mapping):
            parts.append((f"data.sources.{name}.source", given.get("source"), ("split",)))
            changed = given.get("task")
            changed = {**task, **changed} if isinstance(changed, Mapping) else None
            parts.append((f"data.sources.{name}.task", changed, RUNTIME_ARGUMENTS["task"]))
    return [part for part in parts if isinstance(part[1], Mapping)]


def _given(key: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part without what the trainer keeps beside a tokenizer's arguments, its SHA-256."""
    return {name: value for name, value in part.items() if (key, name) != ("tokenizer", "sha256")}


def _forbidden(target: Any, key: str, allowed: Sequence[str]) -> list[str]:
    if not isinstance(target, str):
        return [f"{key} is no part: it needs _target_, the dotted path of a class, and its arguments."]
    if target.startswith((*PREFIXES, *allowed)):
        return []
    top = target.partition(".")[0]
    return [
        f"{key}._target_={target} is code outside trainer and torch.optim, which runs only when you say so:"
        f" add allow_targets=[{top}.] (now {list(allowed)})."
    ]


def _arguments(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "_target_"}


def _full_stop(suggestion: str, key: str) -> str:
    return suggestion.replace("did you mean ", f"did you mean {key}.")


def _resolve(target: str, key: str) -> Callable[..., Any]:
    """Import `package.module.Name`. Raises ConfigError with the nearest module or name."""
    path, _, name = target.rpartition(".")
    place = f"{key}._target_={target}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path != missing and not path.startswith(f"{missing}."):
            raise ConfigError(f"{place} cannot be imported: it needs the package {missing}; install it.") from error
        raise ConfigError(
            f"{place}: there is no module {missing}{did_you_mean(missing, _siblings(missing))}"
        ) from error
    except ValueError as error:  # an empty path
        raise ConfigError(f"{place} is no dotted path such as trainer.models.mlp.MLP.") from error
    found = getattr(module, name, None)
    if found is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        suggestion = _full_stop(did_you_mean(name, public), path)
        raise ConfigError(f"{place}: there is no {name} in {path}{suggestion}")
    if not callable(found):
        raise ConfigError(f"{place} is of type {type(found).__name__}; it must be a class or a function.")
    if target.startswith(PREFIXES) and not (inspect.isclass(found) and f"{found.__module__}.".startswith(PREFIXES)):
        raise ConfigError(f"{place} is no part of a run: parts in {' and '.join(PREFIXES)} are classes of their own.")
    built: Callable[..., Any] = found
    return built


def _siblings(module: str) -> list[str]:
    parent = sys.modules.get(module.rpartition(".")[0])
    return [
        f"{module.rpartition('.')[0]}.{info.name}" for info in pkgutil.iter_modules(getattr(parent, "__path__", []))
    ]


def _hint(parameter: inspect.Parameter, target: Callable[..., Any]) -> Any:
    """The annotation as an object, or Any where there is none or it names something only a type checker sees."""
    hint = parameter.annotation
    if hint is inspect.Parameter.empty:
        return Any
    if isinstance(hint, str):
        try:
            return eval(hint, dict(vars(sys.modules[target.__module__])))
        except NameError:
            return Any
    return hint


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file can stand for the annotation `hint`. What YAML cannot express is not judged."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        plain = [member for member in members if _expressible(member)]
        return not plain or any(fits(value, member) for member in plain)
    if origin is Literal:
        return value in members
    if not _expressible(hint):
        return True
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(fits(element, members[0]) for element in value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = members if members[-1] is not ... else (members[0],) * len(value)
        return len(value) == len(each) and all(map(fits, value, each))
    return isinstance(value, origin or hint)


def _expressible(hint: Any) -> bool:
    known = (None, NoneType, bool, int, float, str, list, dict, tuple, Sequence, Mapping)
    return hint in known or get_origin(hint) in (Literal, Union, UnionType, list, dict, tuple, Sequence, Mapping)
