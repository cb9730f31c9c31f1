"""TLS for the wire, with Ray's own certificates. Both ends must present one of the same authority."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

SWITCH = "RAY_USE_TLS"
CERTIFICATE, KEY, AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"


class TlsSettingsError(ValueError):
    """RAY_USE_TLS is on, and a certificate is missing or does not load."""


def server_context(environ: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """The listening end's context, or None if Ray runs without TLS. Raises TlsSettingsError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, environ)


def client_context(environ: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """The connecting end's context, or None if Ray runs without TLS. Raises TlsSettingsError."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, environ)


def _context(protocol: int, environ: Mapping[str, str]) -> ssl.SSLContext | None:
    if environ.get(SWITCH, "0").lower() not in ("1", "true"):
        return None
    missing = [name for name in (CERTIFICATE, KEY, AUTHORITY) if not environ.get(name)]
    if missing:
        raise TlsSettingsError(f"{SWITCH} is on, so {', '.join(missing)} must name a PEM file")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # nodes are addressed by IP, which Ray's certificates need not name
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(environ[CERTIFICATE], environ[KEY])
        context.load_verify_locations(environ[AUTHORITY])
    except OSError as error:
        names = f"{CERTIFICATE}, {KEY} or {AUTHORITY}"
        raise TlsSettingsError(f"{names} does not load: {error}") from error
    return context
