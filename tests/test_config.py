"""The schema, every shipped YAML file, and every way a configuration can be wrong."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

from trainer.build import RUNTIME_ARGUMENTS, _expressible, _hint, _resolve, check_parts
from trainer.composition import compose, config_directory
from trainer.config import (
    PARTS,
    Config,
    Precision,
    config_from_yaml,
    config_to_dict,
    differences,
    to_config,
    with_tokenizer_sha256,
)
from trainer.errors import ConfigError
from trainer.plan import make_plan
from trainer.wording import flatten

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in config_directory().glob("*/*.yaml")
    if path.parent.name not in ("experiment", "launcher", "cluster")  # the last two are not the trainer's
)
NEEDED = {
    ("data", "hub"): ["data.path=someone/something"],
    ("engine", "zero3_nvme"): ["engine.nvme_path=/tmp"],
    ("data", "files"): ["data.path=train.jsonl"],
    ("model", "cnn"): ["task=classification"],
    ("model", "hf"): ["model.path=folder", "model.kind=seq2seq"],
    ("model", "mlp"): ["task=classification"],
    ("task", "text_classification"): ["task.num_classes=2"],
    **{("model", name): ["task=image_classification"] for name in ("resnet18", "resnet50")},
    **{("model", f"vit_{size}"): ["task=image_classification"] for size in ("tiny", "small", "base", "large", "huge")},
    ("model", "speech"): ["task=speech_recognition"],
    ("task", "speech_recognition"): ["model=speech"],
    ("model", "recommender"): ["task=next_item", "task.num_items=10"],
    ("task", "next_item"): ["task.num_items=10"],
    ("tokenizer", "file"): ["tokenizer.path=tokenizer.json", "tokenizer.vocab_size=100"],
    ("tokenizer", "none"): ["model=mlp", "task=classification"],
}
"""What some choices leave to the user, or go with."""


def part(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "trainer.somewhere.Something", **arguments}


def facts(**changes: Any) -> dict[str, Any]:
    """The least configuration there is, with changes."""
    parts = {"model": part(), "task": part(), "data": part(trace=False), "optimizer": part(lr=0.1), "schedule": part()}
    return {"name": "least", "steps": 10, "batch": {"global_size": 8}, **parts, **changes}


def problems_of(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        to_config(tree)
    return list(caught.value.problems)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_fits_schema_parts_and_one_rank(experiment: str) -> None:
    config = to_config(compose([f"experiment={experiment}"]))
    check_parts(config)
    assert config.name == experiment
    assert make_plan(config, world_size=1).global_size == config.batch.global_size


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_how_it_is_run_and_what_to_expect(experiment: str) -> None:
    lines = (config_directory() / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    header = " ".join(line for line in lines if line.startswith("#"))
    for word in ("command", "hardware", "time", "expected"):
        assert f"# {word} " in header, word


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes_and_fits_its_target(group: str, choice: str) -> None:
    value = f"[{choice}]" if group == "logging" else choice
    needed = ["name=choice", "steps=1", "batch.global_size=1", *NEEDED.get((group, choice), ())]
    check_parts(to_config(compose([f"{group}={value}", *needed])))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_parts_list_every_parameter_of_their_targets(experiment: str) -> None:
    config = config_to_dict(to_config(compose([f"experiment={experiment}"])))
    parts = [(key, config[key], RUNTIME_ARGUMENTS.get(key, ())) for key in PARTS if config[key] is not None]
    parts += [(f"logging.{name}", sink, ()) for name, sink in config["logging"].items()]
    for key, given, runtime in parts:
        target = _resolve(given["_target_"], key)
        for name, parameter in inspect.signature(target).parameters.items():
            if name not in runtime and _sayable(_hint(parameter, target)):
                assert name in given, f"{key}.{name} is not in the YAML file"


def _sayable(hint: Any) -> bool:
    """Whether YAML can say more than null for it."""
    return _expressible(hint) and (not hasattr(hint, "__args__") or any(map(_expressible, _not_none(hint))))


def _not_none(hint: Any) -> list[Any]:
    return [member for member in hint.__args__ if member is not type(None)]


def test_facts_get_their_types_and_defaults() -> None:
    config = to_config(facts(steps="12", precision="fp32", clip_norm=2, seed=3))
    assert (config.steps, config.precision, config.seed) == (12, Precision.fp32, 3)
    assert isinstance(config.clip_norm, float)
    assert config.batch.micro_size is None
    assert (config.runs_dir, config.log.every, config.logging, config.allow_targets) == ("runs", 10, {}, [])
    assert type(config.model) is dict


def test_interpolations_are_resolved() -> None:
    config = to_config(facts(tokenizer=part(vocab_size=50), model=part(vocab_size="${tokenizer.vocab_size}")))
    assert config.model["vocab_size"] == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 5}, "stepps is no key of the configuration; did you mean steps?"),
        ({"batch": {"global_size": 8, "micro": 2}}, "batch.micro is no key of the configuration"),
        ({"steps": "abc"}, "steps='abc' is not a whole number."),
        ({"steps": 1.5}, "steps=1.5 is not a whole number."),
        ({"steps": True}, "steps=True is not a whole number."),
        ({"steps": None}, "steps=None is not a whole number."),
        ({"steps": 0}, "steps=0 is below the least possible value, 1."),
        ({"seed": -1}, "seed=-1 is below"),
        ({"clip_norm": "much"}, "clip_norm='much' is not a number or null."),
        ({"clip_norm": 0.0}, "clip_norm=0 is not above 0; null switches it off."),
        ({"clip_norm": float("nan")}, "clip_norm=nan is not above 0"),
        ({"precision": "fp8"}, "precision='fp8' is not one of fp32, bf16, fp16."),
        ({"resume": "maybe"}, "resume='maybe' is not one of never, auto, must."),
        ({"force_fp16": "perhaps"}, "force_fp16='perhaps' is not true or false."),
        ({"batch": 8}, "batch=8 is no mapping of the keys global_size, micro_size, micro_tokens."),
        ({"batch": {"global_size": 8, "micro_size": [1]}}, "batch.micro_size=[1] is not a whole number or null."),
        ({"allow_targets": "mine."}, "allow_targets='mine.' is not a list"),
        ({"eval": {"final_split": "train"}}, "eval.final_split='train' is not one of test, validation, none."),
        ({"engine": {"kind": "zero", "stage": 4}}, "engine.stage=4 does not go with engine.kind=zero"),
        ({"engine": {"stage": 2}}, "engine.stage=2 does not go with engine.kind=plain"),
        ({"engine": {"offload_optimizer": "cpu"}}, "engine.offload_optimizer=cpu needs ZeRO stage 1"),
        (
            {"engine": {"kind": "zero", "stage": 2, "offload_optimizer": "nvme", "nvme_path": "/tmp"}},
            "engine.offload_optimizer=nvme needs ZeRO stage 3",
        ),
        (
            {"engine": {"kind": "zero", "stage": 3, "offload_optimizer": "nvme"}},
            "engine.offload_optimizer=nvme needs a folder to keep them in; set engine.nvme_path",
        ),
        ({"schedule": part(unit="tokens")}, "schedule.unit=tokens needs the number of tokens"),
        ({"stop": {"patience": 3}}, "stop.patience=3 counts evaluations, and eval.every=0 makes none"),
        ({"model": {"d_model": 8}}, "model={'d_model': 8} is no part: it needs _target_"),
        ({"model": None}, "model=None is no part"),
        ({"logging": {"console": 3}}, "logging.console=3 is no part"),
        ({"logging": [1]}, "logging=[1] is no part"),
        ({"data": part(path="???")}, "data.path has no value; set data.path=..."),
        ({"model": part(size="${nothing.here}")}, "model.size cannot be resolved: Interpolation key 'nothing.here'"),
        ({"steps": "${nothing.here}"}, "steps cannot be resolved"),
        ({"model": part(sizes=["${nothing.here}"])}, "model.sizes.0 cannot be resolved"),
    ],
)
def test_a_mistake_is_told_with_key_value_and_cure(change: dict[str, Any], message: str) -> None:
    problems = problems_of(facts(**change))
    assert len(problems) == 1 and message in problems[0], problems


def test_what_points_to_a_missing_value_is_told_once() -> None:
    tree = facts(tokenizer=part(vocab_size="???"), model=part(vocab_size="${tokenizer.vocab_size}"))
    assert problems_of(tree) == [
        "tokenizer.vocab_size has no value; set tokenizer.vocab_size=..., or choose an experiment=... that sets it."
    ]


def test_all_mistakes_are_told_at_once() -> None:
    tree = facts(stepps=1, seed="x", batch={"global_size": 0}, log={"every": 0}, precision="half")
    del tree["steps"]
    assert len(problems_of(tree)) == 6


@pytest.mark.parametrize("name", ["run", "a/b", "sweep-lr=0.1,seed=2", "v1.2"])
def test_names_that_are_folders(name: str) -> None:
    assert to_config(facts(name=name)).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/../b", "/abs", "a//b", "a b", "a/", "x" * 201, "a\n", "~"])
def test_names_that_are_not(name: str) -> None:
    (problem,) = problems_of(facts(name=name))
    assert problem.startswith(f"name={name!r} must be a folder name")


def test_a_run_reads_back_the_configuration_it_wrote(tmp_path: Path) -> None:
    config = to_config(compose(["experiment=quickstart"]))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    assert config_from_yaml(path) == config
    assert differences(config, config_from_yaml(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1", "is no YAML file"),
        (b"\xff\xfe\x00", "is no YAML file"),
        (b"- 1\n- 2\n", "holds no configuration"),
        (b"steps: many\n", "config.yaml: steps='many' is not a whole number."),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_damaged_configuration_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config_from_yaml(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_differences_are_those_that_change_what_is_learnt() -> None:
    old = to_config(facts(tokenizer=part(sha256=None)))
    free = facts(
        name="other",
        steps=99,
        runs_dir="elsewhere",
        log={"every": 1},
        eval={"every": 5},
        checkpoint={"every": 3},
        engine={"kind": "zero", "stage": 3},
        batch={"global_size": 8, "micro_size": 2},
        data=part(trace=True),
        precision="fp32",
        tokenizer=part(sha256="abc"),
        logging={"console": part()},
    )
    assert differences(old, to_config(free)) == []
    bound = facts(seed=1, batch={"global_size": 16}, optimizer=part(lr=0.2), tokenizer=None, model=part(d=1))
    assert differences(old, to_config(bound)) == [
        "batch.global_size: 8 -> 16",
        "model.d: absent -> 1",
        "optimizer.lr: 0.1 -> 0.2",
        "seed: 0 -> 1",
        "tokenizer: absent -> None",
        "tokenizer._target_: trainer.somewhere.Something -> absent",
    ]


def test_another_tokenizer_is_a_difference() -> None:
    old = with_tokenizer_sha256(to_config(facts(tokenizer=part(sha256=None))), "aaa")
    assert old.tokenizer == part(sha256="aaa")
    assert differences(old, with_tokenizer_sha256(old, "bbb")) == ["tokenizer.sha256: aaa -> bbb"]
    assert differences(old, to_config(facts(tokenizer=part(sha256=None)))) == []


def test_the_main_file_spells_out_the_defaults_of_the_schema() -> None:
    """A default is written twice, in the schema and in train.yaml, for people to see; so the two must agree."""
    shown = dict(flatten(OmegaConf.to_container(OmegaConf.load(config_directory() / "train.yaml"))))  # type: ignore[arg-type]
    of_groups = ("engine.", "checkpoint.", *PARTS, "logging")
    for key, default in _schema_leaves(Config):
        if not key.startswith(of_groups):
            assert shown[key] == default, key


def _schema_leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in fields(schema):
        hint = get_type_hints(schema)[entry.name]
        if is_dataclass(hint):
            yield from _schema_leaves(hint, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry.default_factory() if callable(entry.default_factory) else entry.default


def test_no_key_of_the_schema_is_dead() -> None:
    """Every fact is read, as `config.steps` or `batch.micro_size` or `config.batch.micro_size`, outside the schema."""
    read: set[tuple[str, str]] = set()
    for path in [*ROOT.glob("trainer/**/*.py"), *ROOT.glob("launch/**/*.py")]:
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                    owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                    read.add((owner, node.attr))
    keys = [("config." + key).split(".")[-2:] for key, _ in _schema_leaves(Config)]
    checked_as_values = {"allow_targets"}  # trainer.build reads the mapping, before there is a Config
    dead = [".".join(key) for key in keys if tuple(key) not in read and key[-1] not in checked_as_values]
    assert dead == []


def test_every_fact_is_documented() -> None:
    guide = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = [key for key, _ in _schema_leaves(Config) if key not in (*PARTS, "logging") and f"`{key}`" not in guide]
    assert missing == []
