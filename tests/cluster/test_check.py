"""`cluster.check` prints every finding; its exit status tells whether the service can start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from actors.config import ServiceConfig
from cluster.check import fetch, main, read_with_old_keys
from cluster.serve_file import read_service_config
from tests.support.deadlines import HANG_S
from tests.support.local_ray import ROOT

WEIGHTS = ROOT / "cluster" / "demo" / "weights"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def written(tmp_path: Path, **models: str | Path) -> Path:
    """A copy of the repository's file with absolute paths, and the given models for some roles."""
    file = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    for role, model in file["applications"][0]["args"]["models"].items():
        model["path"] = str(models.get(role, WEIGHTS / role))
    path = tmp_path / "ray_config.yaml"
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    return path


def copied(tmp_path: Path, role: str) -> Path:
    return shutil.copytree(WEIGHTS / role, tmp_path / role)


def test_the_embedded_trio_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "Ready" in printed
    for words in ("weights", "cache per token", "positions", "sessions x context", "Hub cache"):
        assert words in printed


def test_a_misspelt_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace("alpha:", "alhpa:"), encoding="utf-8")
    assert main([str(file)]) == 1
    assert "guidance.alhpa: unknown key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        (None, "exact", "batch_invariant"),
        ("exchange", "widen_above", "max_unseen_mass"),
        ("deadlines", "missing_s", "reconnect_timeout_s"),
        ("deadlines", "silent_s", "peer_timeout_s"),
    ],
)
def test_an_old_config_key_draws_a_warning(
    section: str | None, old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    args = file["applications"][0]["args"]
    keys = args.setdefault(section, {}) if section else args
    keys.pop(new, None)
    keys[old] = old == "exact" or 1
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    assert main([str(path)]) == 0
    assert f"warning config: the key {old} is called {new} now" in capsys.readouterr().out


def test_only_warnings_of_old_keys_become_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(file: Path) -> ServiceConfig:
        warnings.warn("an old key", FutureWarning, stacklevel=1)
        warnings.warn("a file was left open", ResourceWarning, stacklevel=1)
        return read_service_config(file)

    monkeypatch.setattr("cluster.check.read_service_config", read)
    with pytest.warns(ResourceWarning, match="a file was left open"):
        _, found = read_with_old_keys(written(tmp_path))
    assert [finding.message for finding in found] == ["an old key"]


def test_a_missing_model_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(tmp_path, guider="/nowhere/guider"))]) == 1
    assert "models.guider: there is no folder /nowhere/guider" in capsys.readouterr().out


def test_a_guider_of_another_family_is_reported_with_its_coverage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path, "guider")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    victim = next(token for token, id_ in vocabulary.items() if id_ == 300)
    merges = [merge for merge in tokenizer["model"]["merges"] if victim not in ("".join(merge), *merge)]
    tokenizer["model"]["merges"] = [m for m in merges if victim not in "".join(m)]
    vocabulary["\u0120\u0120zz"] = vocabulary.pop(victim)
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert main([str(written(tmp_path, guider=folder))]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "is of another family than the target and reads its text" in printed
    assert "99.95% of the target's text tokens" in printed


def test_differing_positions_and_chat_templates_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path, "guider_base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert main([str(written(tmp_path, guider_base=folder))]) == 0
    printed = capsys.readouterr().out
    assert "reaches 512 positions and the target 4,096" in printed
    assert "(beyond_context: error)" in printed
    assert "has a chat template of its own" in printed


def test_damaged_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path, "target")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    assert main([str(written(tmp_path, target=folder))]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().out


def test_dummy_weights_are_not_downloaded_and_draw_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tmp_path, "target")
    (folder / "model.safetensors").unlink()
    file = written(tmp_path, target=folder)
    assert main([str(file)]) == 1
    args = yaml.safe_load(file.read_text(encoding="utf-8"))
    args["applications"][0]["args"]["models"]["target"]["load_format"] = "dummy"
    file.write_text(yaml.safe_dump(args), encoding="utf-8")
    capsys.readouterr()
    assert main([str(file)]) == 0
    assert "its weights are random" in capsys.readouterr().out
    monkeypatch.setattr("cluster.check.download", lambda path, revision: pytest.fail("weights were downloaded"))
    fetch(read_service_config(file), Console(quiet=True))


def test_download_fetches_models_that_are_no_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_service_config(written(tmp_path, guider="some/guider"))
    fetched: list[tuple[str, str | None]] = []
    monkeypatch.setattr("cluster.check.load_tokenizers", lambda _: {})
    monkeypatch.setattr("cluster.check.download", lambda path, revision: fetched.append((path, revision)))
    fetch(config, Console(quiet=True))
    assert fetched == [("some/guider", None)]


def listening(tmp_path: Path, host: str, **router: object) -> Path:
    """A copy of the repository's file that listens on `host`, with more keys in its router section."""
    path = written(tmp_path)
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    file["http_options"]["host"] = host
    file["applications"][0]["args"]["router"] |= router
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("10.0.0.7", True), ("::", True)],  # noqa: S104
)
def test_listening_beyond_loopback_without_keys_draws_a_warning(
    host: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(listening(tmp_path, host))]) == 0
    assert (f"warning router: listens on {host} without authentication" in capsys.readouterr().out) is warned
    (tmp_path / "keys").write_text("ada:ada-secret-0123456789", encoding="utf-8")
    assert main([str(listening(tmp_path, host, keys={"file": str(tmp_path / "keys")}))]) == 0
    assert "router:" not in capsys.readouterr().out


def test_missing_keys_draw_a_warning_and_malformed_keys_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERVICE_KEYS", raising=False)
    keys = {"file": str(tmp_path / "keys"), "env": "SERVICE_KEYS"}
    assert main([str(listening(tmp_path, "127.0.0.1", keys=keys))]) == 0
    printed = capsys.readouterr().out
    assert f"router.keys.file {tmp_path / 'keys'} does not exist on this machine" in printed
    assert "router.keys.env SERVICE_KEYS is not set on this machine" in printed
    monkeypatch.setenv("SERVICE_KEYS", "ada-secret-0123456789")
    assert main([str(listening(tmp_path, "127.0.0.1", keys={"env": "SERVICE_KEYS"}))]) == 1
    printed = capsys.readouterr().out
    assert "router.keys.env: SERVICE_KEYS, line 1: an entry is name:key" in printed
    assert "secret" not in printed


def test_checking_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from cluster.check import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(written(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "were not checked" not in done.stdout


def test_the_check_names_a_tensor_that_a_model_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path, "guider")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    assert main([str(written(tmp_path, guider=folder))]) == 1
    printed = capsys.readouterr().out
    assert "error guider:" in printed
    assert "its files hold model.layers.1.input_layernorm.weight" in printed


@pytest.mark.parametrize("failure", [subprocess.CalledProcessError(1, "python", stderr="a\nno torch"), OSError("gone")])
def test_tensors_that_cannot_be_inspected_draw_a_warning(
    failure: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sources: object) -> None:
        raise failure

    monkeypatch.setattr("cluster.checkpoints.inspect_in_child", fail)
    assert main([str(written(tmp_path))]) == 0
    assert "the tensors of the checkpoints were not checked: " in capsys.readouterr().out
