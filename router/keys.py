"""API keys: identify the client by the key in the `Authorization: Bearer` header.

Keys are read from a file, an environment variable, or both. Entries `name:key` are separated by white space; a line
that begins with # is a comment. A name may have several keys, so that a key can be replaced without interruption. A key
is a text of at least 16 printable characters, or, in a file that others may read, its digest:

    ada:sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b     # printf %s KEY | sha256sum

Only digests are kept in memory. They are not stretched: use random keys (`openssl rand -hex 24`), not words.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from actors.config import ConfigError, KeysConfig
from router.backend import Unauthorized

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0  # minimum time between two checks of the file for changes
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """The owner's name and the SHA-256 digest of the key's text."""

    name: str
    digest: bytes = field(repr=False)


class Keys:
    """The keys of a router.

    The file is read again after a change; if the new content is invalid, the previous keys stay in force.
    Raises ConfigError if a source is missing, empty or invalid; the message quotes none of its content.
    """

    def __init__(self, config: KeysConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(config.file).expanduser() if config.file else None
        self._clock, self._checked_at = clock, clock()
        self._environment_keys = _read_environment(config.env) if config.env else ()
        self._version = self._file_version()
        self._keys = self._environment_keys + self._read_file()
        _require_different(self._keys)

    def owner(self, authorization: str | None) -> str:
        """The name for a request's Authorization header. Raises Unauthorized."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthorized("this service wants an API key, in the header Authorization: Bearer KEY")
        self._reload_changed_file()
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        name = None
        for key in self._keys:  # no early exit: the time must not reveal which key matched
            if hmac.compare_digest(key.digest, digest):
                name = key.name
        if name is None:
            raise Unauthorized("this API key is not known here", code="invalid_api_key")
        return name

    def _reload_changed_file(self) -> None:
        if self._file is None or self._clock() - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = self._clock()
        version = self._file_version()
        if version == self._version:
            return
        self._version = version
        try:
            keys = self._environment_keys + self._read_file()
            _require_different(keys)
        except ConfigError as error:
            log.error("%s; the keys that were read before stay in force", error)
            return
        self._keys = keys
        log.info("%s has changed: %d keys of %d names", self._file, len(keys), len({key.name for key in keys}))

    def _file_version(self) -> tuple[int, int, int, int] | None:
        """A value that changes with the file; None if there is no file."""
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        # st_ctime_ns also changes with permissions: a file may become readable without being written.
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns

    def _read_file(self) -> tuple[Key, ...]:
        if self._file is None:
            return ()
        try:
            text = self._file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"router.keys.file: {self._file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"router.keys.file: {self._file} is not UTF-8 text") from None
        return _parse(text, f"router.keys.file: {self._file}")


def _read_environment(variable: str) -> tuple[Key, ...]:
    text = os.environ.get(variable)
    if text is None:
        raise ConfigError(f"router.keys.env: the environment has no {variable}")
    return _parse(text, f"router.keys.env: {variable}")


def _parse(text: str, source: str) -> tuple[Key, ...]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            keys += [_parse_entry(entry, f"{source}, line {number}") for entry in line.split()]
    if not keys:
        raise ConfigError(f"{source} holds no key")
    return tuple(keys)


def _parse_entry(entry: str, location: str) -> Key:
    """Parse one entry. Errors do not quote it, not even the name: the key may stand in its place."""
    name, colon, secret = entry.partition(":")
    if not colon or not _NAME.fullmatch(name) or name == "sha256":
        raise ConfigError(
            f"{location}: an entry is name:key or name:sha256:digest; a name has letters, digits, dots, dashes and "
            "underscores, 64 at most"
        )
    if secret.startswith("sha256:"):
        digest = secret.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(f"{location}: a digest is not 64 hexadecimal digits")
        return Key(name, bytes.fromhex(digest))
    if not _KEY.fullmatch(secret):
        raise ConfigError(f"{location}: a key must have 16 printable ASCII characters or more")
    return Key(name, hashlib.sha256(secret.encode()).digest())


def _require_different(keys: tuple[Key, ...]) -> None:
    names: dict[bytes, str] = {}
    for key in keys:
        if names.setdefault(key.digest, key.name) != key.name:
            raise ConfigError(f"router.keys: {names[key.digest]} and {key.name} have the same key")
