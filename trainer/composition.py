"""Everything that knows Hydra: where the configs lie, one job per composition, and what is wrong with a command line.

Hydra stops at the first mistake and tells it in its own words; `mistakes` goes on without it, and so finds them all.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.utils import get_args_parser  # the one description of Hydra's own flags
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from trainer.build import part_problems
from trainer.config import to_config
from trainer.errors import ConfigError
from trainer.wording import did_you_mean, flatten

MAIN = "train"
"""The primary config file."""

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra raises for a command line or a file that a person can mend."""


def config_directory() -> Path:
    """trainer/configs of an installed wheel, or configs/ beside the package in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(overrides: Sequence[str], primary: str = MAIN) -> DictConfig:
    """The composition that `python -m trainer *overrides` would run; with another `primary` config file than the
    trainer's, what that comes to. Of Hydra's flags it knows --config-dir. Raises ConfigError with every mistake."""
    flags = get_args_parser().parse_args(list(overrides))
    extra = [] if flags.config_dir is None else [search_path(flags.config_dir)]
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            return hydra.compose(primary, overrides=[*extra, *flags.overrides])
    except COMPOSITION_ERRORS as error:
        if primary == MAIN:
            raise _told(error, overrides) from error
        raise ConfigError(*(mistakes([f"--config-name={primary}", *overrides])[0] or [_in_one_line(error)])) from error


def execute(job: Callable[[DictConfig, list[str]], int], arguments: Sequence[str]) -> int:
    """Do what Hydra's command line `arguments` ask: print help or a config, run `job`, or run one per sweep value (-m).

    job: gets the composition and what the user typed for it, and returns an exit code. In a sweep a job that raises is
    shown and the next one runs; otherwise the exception passes through. Returns the first exit code that is not 0.
    Raises ConfigError with every mistake when Hydra refuses the command line.
    """
    codes: list[int] = []
    failures: list[Exception] = []

    def task(composed: DictConfig) -> None:
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        overrides: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task)  # type: ignore[assignment]
        try:
            codes.append(job(_named(composed, overrides) if sweeping else composed, overrides))
        except Exception as error:  # Hydra would print its own lines about it
            if sweeping:
                traceback.print_exc()
            else:
                failures.append(error)
            codes.append(1)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting
    sys.argv[1:] = arguments
    try:
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=MAIN)(task)()
    except COMPOSITION_ERRORS as error:
        raise _told(error, arguments) from error
    if failures:
        raise failures[0]
    return next((code for code in codes if code), 0)


def completions(line: str) -> list[str]:
    """What the last word of the arguments `line` could become: groups, choices, keys, values, files."""
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        return BashCompletion(GlobalHydra.instance().config_loader())._query(MAIN, line)


@dataclass(frozen=True)
class Axis:
    """A key of a sweep. choices: its values as one would type them; without any, numbers from `low` to `high`: `whole`
    ones or not, `log`: evenly on a logarithmic scale."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False


def axes(arguments: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The words of a command line that are the same in all jobs of its sweep, and the keys that are not, in Hydra's
    grammar: `a,b`, `choice(a,b)`, `range(1,5)`, `interval(0,1)`, `int(interval(1,8))`, `tag(log,interval(1e-4,1))`.

    Raises ConfigError for words that are no overrides.
    """
    same, found = [], []
    overrides = set(get_args_parser().parse_args(list(arguments)).overrides)
    for word in arguments:
        if word not in overrides:
            same.append(word)
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise _told(error, arguments) from error
        values = override.value()
        if override.is_discrete_sweep():
            found.append(Axis(override.get_key_element(), tuple(override.sweep_string_iterator())))
        elif isinstance(values, IntervalSweep):
            low, high = values.start, values.end
            assert low is not None and high is not None
            whole = isinstance(low, int) and isinstance(high, int)
            found.append(Axis(override.get_key_element(), (), low, high, whole, "log" in values.tags))
        else:
            same.append(word)
    return same, found


def _named(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """`composed` under a name of its own among the jobs of a sweep, unless the user gave one."""
    if OmegaConf.is_missing(composed, "name") or any(override.startswith("name=") for override in overrides):
        return composed
    full = str(HydraConfig.get().job.override_dirname)
    suffix = re.sub(r"[^\w.,=+@-]+", "_", full)
    if len(suffix) > 100:
        suffix = f"{suffix[:90]}-{sha256(full.encode()).hexdigest()[:8]}"
    named = OmegaConf.merge(composed, {"name": f"{composed.name}-{suffix}" if suffix else composed.name})
    assert isinstance(named, DictConfig)
    return named


def _told(error: Exception, arguments: Sequence[str]) -> ConfigError:
    """Everything wrong with `arguments`, which Hydra refused by `error`; if they ask for a run, by the schema too."""
    flags = get_args_parser().parse_args(list(arguments))
    problems, composed = mistakes(arguments)
    if not problems:
        return ConfigError(_in_one_line(error))
    if composed is not None and not (flags.cfg or flags.help or flags.hydra_help or flags.info):
        try:
            to_config(composed, part_problems)
        except ConfigError as more:
            problems += more.problems
    return ConfigError(*problems)


def mistakes(arguments: Sequence[str]) -> tuple[list[str], DictConfig | None]:
    """What is wrong with a command line that Hydra refused, and the composition without the wrong overrides.

    The composition is None where nothing can be said of it (a group choice or a folder is wrong).
    """
    flags = get_args_parser().parse_args(list(arguments))
    extra: list[str] = []
    if flags.config_dir is not None:
        if not Path(flags.config_dir).is_dir():
            return [f"--config-dir {flags.config_dir} is no folder."], None
        extra.append(search_path(flags.config_dir))
    directory = Path(flags.config_path).resolve() if flags.config_path else config_directory()
    with hydra.initialize_config_dir(str(directory), version_base="1.3"):
        return _mistakes(flags.config_name or MAIN, flags.overrides, extra, sweeping=flags.multirun)


def _mistakes(
    name: str, overrides: Sequence[str], extra: Sequence[str], sweeping: bool
) -> tuple[list[str], DictConfig | None]:
    problems: list[str] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if not override.key_or_group:
                raise OverrideParseException(text, "no key")
            parsed.append(override)
        except HydraException:
            problems.append(f"{text!r} is no override: write key=value, and quote a value with spaces: key='\"a b\"'.")
    groups = {override.key_or_group: _choices(override.key_or_group, extra) for override in parsed}
    wrong = {
        override.key_or_group: problem
        for override in parsed
        if groups[override.key_or_group] and (problem := _wrong_choice(override, groups, sweeping))
    }
    problems += wrong.values()
    good = [*extra]
    try:
        composed = hydra.compose(name, overrides=good)
    except COMPOSITION_ERRORS as error:
        return [*problems, _in_one_line(error)], None
    choices_first = sorted(parsed, key=lambda override: not groups[override.key_or_group])
    for override in choices_first:
        if override.key_or_group in wrong:
            continue
        for text in _each_value(override) if sweeping else [str(override.input_line)]:
            try:
                composed = hydra.compose(name, overrides=[*good, text])
                good.append(text)
            except COMPOSITION_ERRORS as error:
                is_group = bool(groups[override.key_or_group])
                unknown = isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError) and not is_group
                if not (unknown and wrong):  # the right choice may have the key
                    problems.append(_explain(override, unknown, error, composed))
                if is_group:
                    wrong[override.key_or_group] = problems[-1]
                break
    return list(dict.fromkeys(problems)), None if wrong else composed


def _choices(group: str, extra: Sequence[str]) -> list[str]:
    """The options of `group`; empty for a key that is no group."""
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group, config_name=None, overrides=list(extra)))


def _each_value(override: Override) -> Iterator[str]:
    """A sweep as one override per value; any other override as it is."""
    if override.is_discrete_sweep():
        yield from (f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator())
    else:
        yield str(override.input_line)


def _wrong_choice(override: Override, groups: dict[str, list[str]], sweeping: bool) -> str | None:
    group = override.key_or_group
    if override.is_sweep_override() and sweeping and override.is_discrete_sweep():
        values = [value.strip("'\"") for value in override.sweep_string_iterator()]
    elif override.is_sweep_override() or override.is_delete():
        return None
    else:
        value = override.value()
        values = list(map(str, value)) if isinstance(value, list) else ["null" if value is None else str(value)]
    for value in values:
        if value not in groups[group]:
            known = ", ".join(groups[group])
            near = did_you_mean(value, groups[group])
            return f"{group}={value} is no choice of the group {group}{near} Choices: {known}."
    return None


def _explain(override: Override, unknown: bool, error: Exception, composed: DictConfig) -> str:
    text, key = override.input_line, override.key_or_group
    if unknown:
        known = dict(flatten(OmegaConf.to_container(composed)))  # type: ignore[arg-type]
        parents = {name.rpartition(".")[0] for name in known} | {name.partition(".")[0] for name in known}
        parent = key.rpartition(".")[0]
        siblings = [name for name in known if parent and name.rpartition(".")[0] == parent]
        listed = f" Keys of {parent}: {', '.join(name.rpartition('.')[2] for name in siblings)}." if siblings else ""
        return f"{text}: {key} is no key of the configuration{did_you_mean(key, {*known, *parents} - {''})}{listed}"
    if "No match in the defaults list" in str(error):
        places = "launcher is for python -m launch, cluster for python -m launch.planner"
        return f"{text}: {key} is no group of this command ({places})."
    if override.is_sweep_override():
        values = str(text).partition("=")[2]
        return f"{text} names several values: write {key}=[{values}] for a list, or add -m to run one job for each."
    if override.is_add() and OmegaConf.select(composed, key) is not None:
        return f"{text}: {key} is there already; write {str(text).lstrip('+')} to change it."
    return f"{text}: {_in_one_line(error)}"


def _in_one_line(error: BaseException) -> str:
    """Hydra's message without its line breaks, with OmegaConf's reason where there is one."""
    reason = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return " ".join(f"{error}{reason}".partition("Config search path:")[0].split())


def search_path(folder: str | Path) -> str:
    """The override by which a composition also looks into `folder`, as --config-dir lets the trainer."""
    return f"hydra.searchpath=['file://{Path(folder).resolve()}']"


def as_experiment(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A command line as a file can say it: the choices of groups, and the values of keys, nested as in the file.

    Raises ConfigError for what no file can say: deleted keys and sweeps.
    """
    choices: dict[str, Any] = {}
    values: dict[str, Any] = {}
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if override.is_delete() or override.is_sweep_override():
                raise ConfigError(f"{override.input_line} cannot be written into an experiment; leave it out.")
            if _choices(override.key_or_group, []):
                choices[override.key_or_group] = override.value()
            elif not override.key_or_group.startswith("hydra."):
                inner = values
                *above, last = override.key_or_group.split(".")
                for name in above:
                    inner = inner.setdefault(name, {})
                inner[last] = override.value()
    return choices, values
