"""Start-up check of the files that the options of a TLS address name.

OpenSSL names neither the file nor the option, and a client that retries reports a missing file as
an unavailable store. Each connection verifies dates, and what Python requires of a CA certificate.
"""

from __future__ import annotations

import os
import ssl
from typing import Final
from urllib.parse import parse_qsl

from service.core.errors import StoreRefused

FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
"""Options of the address that name a file; `ssl_ca_path` names a folder."""


def check_tls_files(url: str) -> None:
    """Check the files of an address that passed `check_address`.

    Raises:
        StoreRefused: naming the option and the file that is missing or invalid.
    """
    options = dict(parse_qsl(url.partition("?")[2]))
    files = {name: options[name] for name in FILES if name in options}
    for name, path in files.items():
        if not os.access(path, os.R_OK):
            reason = "cannot be read" if os.path.exists(path) else "does not exist"
            raise StoreRefused(f"{path} {reason}: {name} of the store's address names it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority := files.get("ssl_ca_certs"):
        try:
            context.load_verify_locations(authority)
        except ssl.SSLError as error:
            raise StoreRefused(
                f"{authority}: expected certificates in PEM format in the file that ssl_ca_certs "
                f"of the store's address names ({error.reason})"
            ) from error
    if certificate := files.get("ssl_certfile"):
        key = files.get("ssl_keyfile")
        try:
            context.load_cert_chain(certificate, key, lambda: options.get("ssl_password", ""))
        except ssl.SSLError as error:
            raise StoreRefused(
                f"{certificate} and {key or 'no ssl_keyfile'}: expected a certificate and its key "
                "in PEM format in the files that ssl_certfile and ssl_keyfile of the store's "
                f"address name ({error.reason})"
            ) from error
