"""The settings that were chosen, as the file of an experiment that the trainer takes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.build import part_problems
from trainer.composition import as_experiment, compose, search_path
from trainer.config import Config, config_to_dict, to_config
from trainer.errors import ConfigError


def write_experiment(path: Path, words: Sequence[str], chosen: Config, header: str) -> str:
    """Write the experiment that `words` compose under the chosen settings; returns the command that runs it.

    path: DIR/experiment/NAME.yaml, which `--config-dir DIR experiment=NAME` finds; the run is called NAME. header:
    its first lines. Raises ConfigError where the path is another, or the file does not come to what was chosen.
    """
    if path.suffix != ".yaml" or path.parent.name != "experiment":
        raise ConfigError(
            f"write={path}: the trainer finds experiments in a folder called experiment; write into one, such as"
            f" write={path.parent / 'experiment' / path.with_suffix('.yaml').name}."
        )
    content = _content(words, chosen, path.stem)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    before = path.read_text(encoding="utf-8") if path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
        path.write_text(f"# @package _global_\n{comments}{text}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"write={path}: {error.strerror}; choose another place.") from error
    try:
        _check(path, chosen)
    except ConfigError:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
        raise
    return f"python -m trainer --config-dir {path.parent.parent} experiment={path.stem}"


def _content(words: Sequence[str], config: Config, name: str) -> dict[str, Any]:
    """The file: what was typed, under what was chosen."""
    choices, values = as_experiment(words)
    base = choices.pop("experiment", None)
    defaults: list[Any] = [] if base is None else [base]
    defaults += [{f"override /{group}": choice} for group, choice in choices.items()]
    plain = config_to_dict(config)
    chosen = {"batch": plain["batch"], "engine": plain["engine"]}
    if "lanes" in config.data:
        chosen["data"] = {"lanes": config.data["lanes"]}
    return {"defaults": [*defaults, "_self_"], **_merged(values, {"name": name, **chosen})}


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`, mappings one by one."""
    result = {**under}
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        result[key] = _merged(under[key], value) if both else value
    return result


def _check(path: Path, wanted: Config) -> None:
    """Raises ConfigError where the file, composed as the trainer would, is not the configuration that was chosen."""
    words = [search_path(path.parent.parent), f"experiment={path.stem}"]
    found = config_to_dict(to_config(compose(words), part_problems))
    missing = {**config_to_dict(wanted), "name": path.stem}
    if found != missing:
        differing = ", ".join(key for key in missing if missing[key] != found[key])
        raise ConfigError(
            f"write={path}: the experiment cannot be written so that the trainer composes the same ({differing} would"
            " differ); write it into the folder of --config-dir, and give choices of groups in an experiment's file."
        )
