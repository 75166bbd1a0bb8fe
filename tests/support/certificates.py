"""Self-signed certificates of 127.0.0.1."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.needs import find_program


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority, and a certificate of 127.0.0.1 that it signed."""

    authority: Path
    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """What a server is started with."""
        return (
            *("--tls-ca-cert-file", str(self.authority)),
            *("--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.key)),
            *("--tls-auth-clients", "no"),
        )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Self-signed certificates that are valid for a day."""
    signing = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    return make_certificates(tmp_path_factory.mktemp("tls"), *signing)


def make_certificates(folder: Path, *signing: str) -> Certificates:
    """Make certificates with `openssl`, that of the CA with further options."""
    openssl = find_program("openssl")
    made = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    fresh = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1")
    ours = ("-keyout", folder / "ca.key", "-out", made.authority, "-subj", "/CN=authority")
    theirs = ("-keyout", made.key, "-out", made.certificate, "-subj", "/CN=server")
    signed = ("-CA", made.authority, "-CAkey", folder / "ca.key")
    name = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
    for arguments in ((*fresh, *ours, *signing), (*fresh, *theirs, *signed, *name)):
        subprocess.run([openssl, *arguments], check=True, capture_output=True)
    return made
