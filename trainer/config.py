"""The schema of every closed fact, and the strict way from Hydra's composition to a frozen `Config`.

Facts are dataclasses; a key that is not here is an error with a suggestion. Parts (model, task, data, tokenizer,
optimizer, schedule, logging) are mappings with a `_target_`; `trainer.build` binds them to the target's signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from trainer.errors import ConfigError
from trainer.impossible import impossible
from trainer.metrics.norms import Norms
from trainer.secrecy import secret_problems
from trainer.wording import describe, did_you_mean, flatten


class Precision(StrEnum):
    """Number format of parameters, activations and gradients; masters and optimizer states are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """What to do with a run directory of the same name: refuse it, go on if there is a checkpoint, or insist on one."""

    never = "never"
    auto = "auto"
    must = "must"


class EngineKind(StrEnum):
    """`plain` is PyTorch alone; `zero` is DeepSpeed ZeRO."""

    plain = "plain"
    zero = "zero"


class OnAnomaly(StrEnum):
    """What to do where loss or gradient are anomalous: leave the update out, go back to the last checkpoint, or end."""

    skip = "skip"
    rollback = "rollback"
    stop = "stop"


class FinalSplit(StrEnum):
    """The split to evaluate when training has ended."""

    test = "test"
    validation = "validation"
    none = "none"


class Offload(StrEnum):
    """Where a sharded state lives when it is not in use."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class ActivationOffload(StrEnum):
    """Where what the backward pass needs waits for it."""

    none = "none"
    cpu = "cpu"


class Recompute(StrEnum):
    """What of a layer the backward pass computes again: nothing, all but products of matrices and attention, or all."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(frozen=True)
class BatchConfig:
    """Samples per optimizer step over all ranks, and how much one rank passes forward at once."""

    global_size: int = MISSING
    micro_size: int | None = None  # samples; None: the whole share of a rank at once
    micro_tokens: int | None = None  # padded positions (source + target); instead of micro_size


@dataclass(frozen=True)
class LogConfig:
    """`every`: steps between two lines of metrics.jsonl and the console; `norms`: of the gradient, in these lines."""

    every: int = 10
    norms: Norms = Norms.parts


@dataclass(frozen=True)
class EvalConfig:
    """When to evaluate on the validation split, and on how much of it."""

    every: int = 0  # steps; 0: only at the end
    max_samples: int | None = None
    generate: bool = True  # also decode (BLEU, chrF ...), which takes far longer; the final evaluation always does
    final_split: FinalSplit = FinalSplit.test  # evaluated once at the end of the run


@dataclass(frozen=True)
class StopConfig:
    """Ends of a run besides `steps`; the first to come true stops it and is named."""

    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    patience: int | None = None  # evaluations without improvement of the task's headline metric


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 0  # steps; 0: only at the end
    minutes: float | None = None  # also after so much training time
    keep: int = 2  # newest
    keep_every: int | None = None  # and, for good, those of steps that it divides
    asynchronous: bool = True  # written in a thread while training goes on
    remote: str | None = None  # URL of a folder for copies: REMOTE/NAME/checkpoints


@dataclass(frozen=True)
class EngineConfig:
    """How the states are held: `kind=zero` shards them over the ranks by ZeRO `stage`."""

    kind: EngineKind = EngineKind.plain
    stage: int = 0
    offload_optimizer: Offload = Offload.none
    offload_parameters: Offload = Offload.none
    sequence_parallel: int = 1  # ranks that share the positions of each sequence
    tensor_parallel: int = 1  # ranks that share each matrix of the layers
    nvme_path: str | None = None  # folder that what is offloaded to nvme is kept in while the run goes on
    recompute: Recompute = Recompute.none
    offload_activations: ActivationOffload = ActivationOffload.none
    compile: bool = False


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights; it is saved beside them."""

    decay: float | None = None  # of an update; null: none is kept
    evaluate: bool = False  # evaluate the average instead of the weights while training


@dataclass(frozen=True)
class GuardConfig:
    """What protects a run from itself."""

    on_anomaly: OnAnomaly = OnAnomaly.skip  # of the loss or the gradient
    spike_factor: float | None = None  # above this multiple of the running median; None: only where not finite
    max_anomalies: int = 10  # within 100 steps
    start_seconds: float | None = 1800.0  # until the first step is done; a rank that takes longer hangs
    step_seconds: float | None = 900.0  # for each part of a later step; evaluating and saving have four times as long


@dataclass(frozen=True)
class PrivacyConfig:
    """Differentially private training (DP-SGD); None: off."""

    noise_multiplier: float | None = None  # deviation of the noise / clip_norm
    clip_norm: float = 1.0  # of each sample's gradient
    num_samples: int | None = None  # of the train split: the budget depends on how often each is seen
    delta: float = 1e-5  # probability that the promise does not hold; well below 1 / num_samples
    max_epsilon: float | None = None  # a run that would spend more is refused


@dataclass(frozen=True)
class DebugConfig:
    """Switches for people who look for a fault, or for time."""

    traceback: bool = False
    profile_steps: int = 0  # recorded into profile/ of the run directory
    profile_after: int = 10  # steps of this start, which warm up


@dataclass(frozen=True)
class Config:
    """One run. Every value that scripts rely on is described in docs/configuration.md."""

    name: str = MISSING
    runs_dir: str = "runs"
    seed: int = 0
    steps: int = MISSING
    precision: Precision = Precision.bf16
    force_fp16: bool = False  # fp16 for model families known to overflow in it
    clip_norm: float | None = 1.0
    init_from: str | None = None  # first weights: hf:FOLDER, hf:ORG/NAME, run:NAME
    resume: Resume = Resume.auto
    dry_run: bool = False  # print the summary, plan.json and ds_config.json for WORLD_SIZE ranks, and stop
    batch: BatchConfig = field(default_factory=BatchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    allow_targets: list[str] = field(default_factory=list)  # prefixes of your own code that `_target_` may name
    model: dict[str, Any] = MISSING
    task: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    tokenizer: dict[str, Any] | None = None
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    logging: dict[str, Any] = field(default_factory=dict)  # sinks by name, each a part


PARTS = ("model", "task", "data", "tokenizer", "optimizer", "schedule")
"""The keys that hold one part each; `logging` holds parts by name."""

_FREE = (
    *("name", "runs_dir", "steps", "resume", "dry_run", "allow_targets", "log", "eval", "stop", "checkpoint"),
    *("init_from", "precision", "logging", "guard", "debug", "engine", "batch.micro_size", "batch.micro_tokens"),
    *("data.trace", "data.workers", "data.retry_seconds", "data.max_bad_fraction", "data.on_bad_record"),
    "ema.evaluate",
)
"""Keys, with all below them, that may change when a run goes on: what a step learns does not depend on them, or, of
the precision, only in rounding, for the masters are fp32 in all."""


def to_config(
    composed: DictConfig | Mapping[str, Any], part_problems: Callable[[Mapping[str, Any]], list[str]] | None = None
) -> Config:
    """The frozen configuration of a composition: Hydra's, or the content of a run's config.yaml.

    Interpolations are resolved. Raises ConfigError with every unknown key, missing value, wrong type and impossible
    number, and, with `trainer.build.part_problems`, every argument that does not fit its part.
    """
    problems: list[str] = []
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    values = _read(Config, _resolve(node, "", problems), "", problems)
    problems += impossible(dict(flatten(values)))
    problems += secret_problems(values)
    if part_problems is not None:
        problems += part_problems(values)
    if problems:
        raise ConfigError(*problems)
    config: Config = _construct(Config, values)
    return config


def _resolve(node: DictConfig | ListConfig, prefix: str, problems: list[str]) -> Any:
    """Plain containers with every interpolation replaced; `???` stays in facts, and is a problem in parts."""
    keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else list(node)
    plain: dict[Any, Any] = {}
    for key in keys:
        try:
            value = MISSING if OmegaConf.is_missing(node, key) else node[key]
        except InterpolationToMissingValueError:
            plain[key] = MISSING  # the key it points to is reported
            continue
        except OmegaConfBaseException as error:
            problems.append(f"{prefix}{key} cannot be resolved: {str(error).splitlines()[0]}.")
            plain[key] = MISSING
            continue
        if value == MISSING and prefix.startswith(tuple(f"{part}." for part in (*PARTS, "logging"))):
            problems.append(_missing(f"{prefix}{key}"))
        container = isinstance(value, DictConfig | ListConfig)
        plain[key] = _resolve(value, f"{prefix}{key}.", problems) if container else value
    return list(plain.values()) if isinstance(node, ListConfig) else plain


def _missing(key: str) -> str:
    return f"{key} has no value; set {key}=..., or choose an experiment=... that sets it."


def _read(schema: Any, given: Mapping[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """The good values for the fields of the dataclass `schema`, in their types, nested like it; adds to `problems`."""
    hints = get_type_hints(schema)
    typed = OmegaConf.structured(schema)
    OmegaConf.set_readonly(typed, False)
    values: dict[str, Any] = {}
    for name in given:
        if f"{prefix}{name}" == "experiment":
            problems.append("The experiment's file must begin with the line `# @package _global_`, and hold a mapping.")
        elif name not in hints:
            problems.append(
                f"{prefix}{name} is no key of the configuration{did_you_mean(f'{prefix}{name}', _keys(Config))}"
            )
    for entry in fields(schema):
        name, key, hint = entry.name, prefix + entry.name, hints[entry.name]
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        value = given.get(name, {} if is_dataclass(hint) else default)
        if value == MISSING:
            problems += [] if f"{key} cannot be resolved" in "".join(problems) else [_missing(key)]
        elif is_dataclass(hint) and isinstance(value, Mapping):
            values[name] = _read(hint, value, f"{key}.", problems)
        elif is_dataclass(hint):
            problems.append(f"{key}={value!r} is no mapping of the keys {', '.join(get_type_hints(hint))}.")
        elif key in PARTS or key == "logging":
            malformed = _malformed(key, value, optional=NoneType in get_args(hint))
            problems += malformed
            values |= {} if malformed else {name: value}
        else:
            try:
                values[name] = _convert(typed, name, value)
            except OmegaConfBaseException:
                problems.append(f"{key}={value!r} is not {describe(hint)}.")
    return values


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        yield prefix + name


def _convert(typed: Any, name: str, value: Any) -> Any:
    """`value` as the type of the field `name` of `typed`, by OmegaConf's rules ("10" is a whole number, 1.5 is not)."""
    typed[name] = value
    converted = typed[name]
    return OmegaConf.to_container(converted) if isinstance(converted, ListConfig) else converted


def _malformed(key: str, value: Any, optional: bool = False) -> list[str]:
    """What keeps `value` from being a part (for `logging`: parts by name)."""
    if value is None and optional:
        return []
    if key == "logging" and isinstance(value, Mapping):
        return [problem for name, sink in value.items() for problem in _malformed(f"logging.{name}", sink)]
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        return [f"{key}={value!r} is no part: it needs _target_, the dotted path of a class, and its arguments."]
    return []


def _construct(schema: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(schema)
    return schema(
        **{name: _construct(hints[name], v) if is_dataclass(hints[name]) else v for name, v in values.items()}
    )


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain containers for YAML and JSON: mappings, lists, numbers, texts (enumerations by name), booleans, None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(below) for key, below in value.items()}
        return value.value if isinstance(value, Enum) else value

    converted: dict[str, Any] = plain(asdict(config))
    return converted


def config_from_yaml(path: Path) -> Config:
    """The configuration that a run wrote as its config.yaml. Raises ConfigError, naming the file."""
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (YAMLError, UnicodeDecodeError, RecursionError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}.") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds no configuration; it should be a mapping of keys to values.")
    try:
        return to_config(loaded)
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.problems)) from error


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that must not change when a run goes on; empty when `new` may continue `old`.

    A tokenizer's SHA-256 that one side does not know yet is no difference.
    """
    before, after = dict(flatten(config_to_dict(old))), dict(flatten(config_to_dict(new)))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted({*before, *after})
        if before.get(key, MISSING) != after.get(key, MISSING)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
        and not (key == "tokenizer.sha256" and None in (before.get(key), after.get(key)))
    ]


def with_tokenizer_sha256(config: Config, digest: str) -> Config:
    """`config` with the SHA-256 of its tokenizer's file written beside the tokenizer's arguments."""
    assert config.tokenizer is not None, "a run without a tokenizer has no digest of one"
    return replace(config, tokenizer={**config.tokenizer, "sha256": digest})
