"""Manifests against the models that Kubeflow publishes of its own objects and of those of Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from trainer.errors import SetupError
from trainer.wording import did_you_mean

Manifest = Mapping[str, Any]

_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[munkMGTPE]|[eE][+-]?\d+)?")
_MODELS = {
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "JobSet": "JobsetV1alpha2JobSet",
    "ConfigMap": "IoK8sApiCoreV1ConfigMap",
}


def field_problems(manifest: Manifest) -> list[str]:
    """What Kubernetes would refuse in `manifest`, each with the path of the field: unknown and missing fields, values
    of another type or outside a field's choices. Of a PyTorchJob only the pods are looked at: the package has no model
    of it. Raises SetupError without the extra [kubernetes]."""
    models, kind = _models(), str(manifest["kind"])
    if kind == "PyTorchJob":
        pods = manifest["spec"]["pytorchReplicaSpecs"]
        return [
            problem
            for role, replicas in pods.items()
            for problem in _problems(
                models.IoK8sApiCoreV1PodTemplateSpec,
                replicas["template"],
                f"spec.pytorchReplicaSpecs.{role}.template",
            )
        ]
    return _problems(getattr(models, _MODELS[kind]), manifest, "")


def pod_problems(spec: Manifest, path: str) -> list[str]:
    """The same of some fields of a pod's spec, which stand at `path`."""
    return _problems(_models().IoK8sApiCoreV1PodSpec, {"containers": [], **spec}, path)


def _models() -> Any:
    try:
        from kubeflow_trainer_api import models
    except ImportError as error:
        raise SetupError(
            "Manifests are checked by kubeflow-trainer-api, which is not installed: install shardwright[kubernetes]."
        ) from error
    return models


def _problems(model: Any, value: Any, path: str) -> list[str]:
    """What keeps `value` from being one of the class `model`."""
    if model.__name__.endswith("ResourceQuantity"):
        right = isinstance(value, int | float | str) and _QUANTITY.fullmatch(str(value))
        return [] if right else [f"{path}: {value!r} is no quantity such as 4, 500m or 16Gi."]
    if model.__name__.endswith("IntOrString"):
        return [] if isinstance(value, int | str) else [f"{path}: {value!r} is neither a whole number nor a text."]
    if not isinstance(value, Mapping):
        return [f"{path}: {value!r} is no mapping of the fields of {_short(model)}."]
    fields = {field.alias or name: (name, field) for name, field in model.model_fields.items()}
    problems = []
    for key, given in value.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in fields:
            problems.append(f"{where} is no field of {_short(model)}{did_you_mean(str(key), fields)}")
            continue
        name, field = fields[key]
        below = _below(field.annotation, given, where)
        problems += _refused(model, name, given, where) if below is None else below
    problems += [
        f"{f'{path}.{key}'.lstrip('.')} is missing: {_short(model)} needs it."
        for key, (_, field) in fields.items()
        if field.is_required() and key not in value
    ]
    return problems


def _below(hint: Any, value: Any, path: str) -> list[str] | None:
    """The problems of a field that holds other models, alone, in a list or by name; None where it holds none."""
    hint = next((member for member in get_args(hint) if member is not type(None)), hint) if _optional(hint) else hint
    origin, members = get_origin(hint), get_args(hint)
    if hasattr(hint, "model_fields"):
        return _problems(hint, value, path)
    if origin is list and hasattr(members[0], "model_fields"):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list."]
        return [problem for i, one in enumerate(value) for problem in _problems(members[0], one, f"{path}[{i}]")]
    if origin is dict and hasattr(members[1], "model_fields"):
        if not isinstance(value, Mapping):
            return [f"{path}: {value!r} is no mapping."]
        return [problem for name, one in value.items() for problem in _problems(members[1], one, f"{path}.{name}")]
    return None


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _refused(model: Any, name: str, value: Any, path: str) -> list[str]:
    """The model's own word on the value of one field."""
    from pydantic import ValidationError

    try:
        model.__pydantic_validator__.validate_assignment(model.model_construct(), name, value)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        return [f"{path}={value!r}: {said[0].lower()}{said[1:]}."]
    return []


def _short(model: Any) -> str:
    """A class's name without the group and version before it."""
    return re.sub(r"^.*(V\d+(alpha|beta)?\d*)", "", model.__name__) or model.__name__
