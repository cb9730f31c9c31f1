"""Reads and checks a Serve config file such as `ray_config.yaml`.

Ray silently accepts unknown keys at every level of such a file. Here each one is an error that names the key.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from actors.config import ConfigError, ServiceConfig, load_config

IMPORT_PATH = "router.app:build"


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a mapping with a repeated key; PyYAML silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: the key {', '.join(twice)} is repeated in one mapping")
        return super().construct_mapping(node, deep)


def read_service_config(path: Path) -> ServiceConfig:
    """The service's configuration in a Serve config file. Raises ConfigError naming every wrong key, Ray's included."""
    file = read_mapping(path)
    problems = [*_unknown_keys(ServeDeploySchema, file), *_invalid_values(file)]
    applications = [a for a in _list(file.get("applications")) if isinstance(a, dict)]
    ours = [(i, a) for i, a in enumerate(applications) if a.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        problems.append(f"applications: exactly one must have import_path {IMPORT_PATH}, but {len(ours)} have")
    for i, application in ours:
        if application.get("deployments"):
            problems.append(
                f"applications.{i}.deployments: must stay empty; set replicas, CPUs and GPUs in args.models, "
                "args.coordinator and args.router"
            )
    try:
        config = load_config(ours[0][1].get("args") or {}) if ours else None
    except ConfigError as error:
        problems += [f"applications.{ours[0][0]}.args.{line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    assert config is not None
    return config


def listening_host(path: Path) -> str:
    """The HTTP host of a Serve config file that `read_service_config` accepts."""
    host: str = ServeDeploySchema.model_validate(read_mapping(path)).http_options.host
    return host


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for an unreadable file, another content or a repeated key."""
    try:
        file = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(file, dict):
        raise ConfigError(f"{path} does not hold a mapping at its top level")
    return file


def _unknown_keys(schema: type[BaseModel], data: dict[str, Any], where: str = "") -> Iterator[str]:
    """A sentence for each key of `data` that is unknown to `schema` or to a schema inside it."""
    fields = {field.alias or name: field for name, field in schema.model_fields.items()} | dict(schema.model_fields)
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            yield f"{where}{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
            continue
        inner = _schema_inside(fields[key].annotation)
        if inner is None:
            continue
        if isinstance(value, dict):
            yield from _unknown_keys(inner, value, f"{where}{key}.")
        for i, item in enumerate(_list(value)):
            if isinstance(item, dict):
                yield from _unknown_keys(inner, item, f"{where}{key}.{i}.")


def _schema_inside(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in a field's type: itself, or inside Optional, List and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_schema_inside(part) for part in typing.get_args(annotation))
    return next((schema for schema in found if schema), None)


def _invalid_values(file: dict[str, Any]) -> Iterator[str]:
    try:
        ServeDeploySchema.model_validate(file)
    except ValidationError as error:
        for item in error.errors():
            yield f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg'].removeprefix('Value error, ')}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
