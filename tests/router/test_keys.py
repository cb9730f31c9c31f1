"""API keys: owners of keys, and errors for invalid keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from actors.config import ConfigError, KeysConfig
from router.backend import Unauthorized
from router.keys import CHECK_INTERVAL_S, Keys

ADA, EVE, NEW = "ada-secret-0123456789", "eve-secret-0123456789", "new-secret-0123456789"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    return path


def keys(path: Path, clock: Clock | None = None) -> Keys:
    return Keys(KeysConfig(file=str(path)), clock or Clock())


def refused(held: Keys, authorization: str | None) -> Unauthorized:
    with pytest.raises(Unauthorized) as raised:
        held.owner(authorization)
    return raised.value


def test_a_key_is_accepted_by_text_or_digest(tmp_path: Path) -> None:
    held = keys(written(tmp_path, f"# ours\nada:{ADA}\n\n  eve:{digest(EVE)}\n"))
    assert held.owner(f"Bearer {ADA}") == "ada"
    assert held.owner(f"bearer  {EVE} ") == "eve"


def test_a_name_may_have_two_keys(tmp_path: Path) -> None:
    held = keys(written(tmp_path, f"ada:{ADA} ada:{NEW}"))
    assert [held.owner(f"Bearer {key}") for key in (ADA, NEW)] == ["ada", "ada"]


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        ADA,
        f"Basic {ADA}",
        f"Bearer {ADA}x",
        f"Bearer {ADA[:-1]}",
        f"Bearer ada:{ADA}",
        f"Bearer {digest(ADA)}",
        "Bearer caf\u00e9",
    ],
)
def test_an_invalid_key_is_refused_and_not_quoted(tmp_path: Path, authorization: str | None) -> None:
    error = refused(keys(written(tmp_path, f"ada:{ADA}")), authorization)
    assert (error.status, error.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert "secret" not in str(error.body("r"))


def test_a_digest_is_compared_in_constant_time_with_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = keys(written(tmp_path, f"ada:{ADA} eve:{EVE} new:{NEW}"))
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert held.owner(f"Bearer {ADA}") == "ada"
    assert compared == [(32, 32)] * 3  # the first one matches, the others are compared all the same
    refused(held, "Bearer short")
    assert compared == [(32, 32)] * 6


def test_keys_from_the_environment_and_the_file_both_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEYS", f"eve:{EVE} new:{digest(NEW)}")
    held = Keys(KeysConfig(file=str(written(tmp_path, f"ada:{ADA}")), env="SERVICE_KEYS"))
    assert [held.owner(f"Bearer {key}") for key in (ADA, EVE, NEW)] == ["ada", "eve", "new"]
    assert Keys(KeysConfig(env="SERVICE_KEYS")).owner(f"Bearer {EVE}") == "eve"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("ada-secret-0123456789", "line 1: an entry is name:key"),
        (f"ada:{ADA}\na/b:{EVE}", "line 2: an entry is name:key"),
        (digest(ADA), "line 1: an entry is name:key"),  # a digest without a name must not become a key
        ("ada-secret-0123456789:ada", "line 1: a key must have 16"),
        ("ada:secret", "line 1: a key must have 16"),
        ("ada:sha256:secret", "line 1: a digest is not 64"),
        (f"ada:{ADA}\neve:{digest(ADA)}", "ada and eve have the same key"),
    ],
)
def test_an_invalid_file_is_refused_by_line_and_not_quoted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        keys(written(tmp_path, text))
    assert "secret" not in str(raised.value)


def test_a_missing_or_unreadable_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVICE_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"router.keys.file: .*/keys cannot be read: No such file"):
        keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match=r"router.keys.env: the environment has no SERVICE_KEYS"):
        Keys(KeysConfig(env="SERVICE_KEYS"))
    (tmp_path / "keys").write_bytes(b"ada:\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        keys(tmp_path / "keys")


def test_printing_keys_shows_neither_key_nor_digest(tmp_path: Path) -> None:
    held = keys(written(tmp_path, f"ada:{ADA}"))
    printed = f"{held!r} {held} {held._keys!r}"
    assert "ada" in printed
    for secret in (ADA, digest(ADA).removeprefix("sha256:"), repr(hashlib.sha256(ADA.encode()).digest())):
        assert secret not in printed


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    clock, path = Clock(), written(tmp_path, f"ada:{ADA}")
    held = keys(path, clock)
    path.write_text(f"eve:{EVE}", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert held.owner(f"Bearer {ADA}") == "ada"  # the last check of the file was too recent
    clock.now += CHECK_INTERVAL_S
    assert held.owner(f"Bearer {EVE}") == "eve"
    assert refused(held, f"Bearer {ADA}").code == "invalid_api_key"


def test_an_unreadable_file_is_read_after_its_permissions_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, path = Clock(), written(tmp_path, f"ada:{ADA}")
    held = keys(path, clock)
    path.write_text(f"eve:{EVE}", encoding="utf-8")
    with monkeypatch.context() as locked:
        locked.setattr(
            Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        clock.now += CHECK_INTERVAL_S
        assert held.owner(f"Bearer {ADA}") == "ada"
    path.chmod(0o640)
    clock.now += CHECK_INTERVAL_S
    assert held.owner(f"Bearer {EVE}") == "eve"


@pytest.mark.parametrize("text", ["eve:secret", "", f"a:{NEW} b:{NEW}", None])
def test_an_invalid_change_keeps_the_keys_and_is_logged_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    clock, path = Clock(), written(tmp_path, f"ada:{ADA}")
    held = keys(path, clock)
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="utf-8")
    for _ in range(3):
        clock.now += CHECK_INTERVAL_S
        assert held.owner(f"Bearer {ADA}") == "ada"
    assert caplog.text.count("stay in force") == 1
    assert "secret" not in caplog.text
    path.write_text(f"eve:{EVE}", encoding="utf-8")
    clock.now += CHECK_INTERVAL_S
    assert held.owner(f"Bearer {EVE}") == "eve"
