"""A Serve config file with a key that Ray would ignore is refused, at every level."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config import ConfigError
from cluster.serve_file import read_service_config
from tests.support.local_ray import ROOT

TEXT = (ROOT / "ray_config.yaml").read_text(encoding="utf-8")


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert old in TEXT
    file = tmp_path / "ray_config.yaml"
    file.write_text(TEXT.replace(old, new), encoding="utf-8")
    return file


def test_the_repositorys_file_is_valid() -> None:
    config = read_service_config(ROOT / "ray_config.yaml")
    assert config.models.target.path == "cluster/demo/weights/target"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("proxy_location: HeadOnly", "proxy_locaton: HeadOnly", "proxy_locaton: unknown key; did you mean proxy_loc"),
        ("host: 127.0.0.1", "hots: 127.0.0.1", "http_options.hots: unknown key; did you mean host"),
        ("route_prefix:", "route_prefx:", "applications.0.route_prefx: unknown key"),
        ("deployments: []", "deployments: [{name: A, num_replica: 2}]", "applications.0.deployments.0.num_replica"),
        ("      name: thinklogit", "      nmae: thinklogit", "applications.0.args.nmae: unknown key"),
        ("alpha: 1.0", "alhpa: 1.0", "applications.0.args.guidance.alhpa: unknown key"),
        ("port: 8000", "port: eight", "http_options.port: Input should be a valid integer"),
        ("alpha: 1.0", "alpha: .nan", "alpha must be a finite number"),
        ("deployments: []", "deployments: [{name: Target}]", "deployments: must stay empty"),
        ("router.app:build", "router.app:bild", "exactly one must have import_path router.app:build, but 0 have"),
        ("k: 128", "k: 128\n        k: 64", "the key k is repeated"),
        ("version: 1", "version: 2", "applications.0.args.version"),
        ("proxy_location: HeadOnly", "- proxy_location", "is not YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_service_config(edited(tmp_path, old, new))
    assert message in str(refused.value)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    file = edited(tmp_path, "host:", "hots:")
    file.write_text(file.read_text(encoding="utf-8").replace("alpha: 1.0", "alhpa: 1.0"), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_service_config(file)
    assert len(str(refused.value).splitlines()) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        read_service_config(tmp_path / "nowhere.yaml")
