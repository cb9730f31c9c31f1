"""Certificates of an authority made for a test, under the names by which Ray and the wire are given them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from actors.wire import tls


def ray_tls_settings(folder: Path, addresses: Sequence[str] = ("127.0.0.1",)) -> dict[str, str]:
    """RAY_USE_TLS and RAY_TLS_* with a fresh authority and one certificate of it that is good for these addresses."""
    authority, authority_key, key, request, certificate, names = (
        str(folder / name) for name in ("ca.pem", "ca.key", "node.key", "node.csr", "node.pem", "names.cnf")
    )
    subjects = ["DNS:localhost", *(f"IP:{address}" for address in addresses)]
    Path(names).write_text(f"subjectAltName = {','.join(subjects)}\n")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", "-x509", *ec, "-keyout", authority_key, "-out", authority, "-subj", "/CN=ca", "-days", "2")
    _openssl("req", *ec, "-keyout", key, "-out", request, "-subj", "/CN=node")
    signing = ("-CA", authority, "-CAkey", authority_key, "-CAcreateserial", "-days", "2", "-extfile", names)
    _openssl("x509", "-req", "-in", request, *signing, "-out", certificate)
    return {tls.SWITCH: "1", tls.CERTIFICATE: certificate, tls.KEY: key, tls.AUTHORITY: authority}


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
