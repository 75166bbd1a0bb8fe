"""The address of a store: its validation, its parts, its password and the files that it names.

A special character of the password that is not percent-encoded changes how the address is parsed:
part of the password would be taken for a host and logged. Such an address is rejected before it is
used, and no message contains any part of it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

from service.core.errors import StoreRefused

CLUSTER_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
SENTINEL_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", *CLUSTER_SCHEMES, *SENTINEL_SCHEMES)

OPTIONS: Final = frozenset({"host", "port", "db", "username", "password", "path"})
"""Options that the query of an address may have, besides `ssl_*`."""

SENTINEL_OPTIONS: Final = frozenset({"sentinel_username", "sentinel_password"})
"""Further options of the address of Sentinels: their own user."""

CLUSTER_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

TLS_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
"""Options of the address that name a file; `ssl_ca_path` names a folder."""

MAX_PASSWORD: Final = 4096
"""Longest password in a file, in characters."""

_IS_HARMLESS = re.compile(r"host|port|db|(sentinel_)?username|path|ssl_(?!password).*").fullmatch
_TCP_LOCATION = re.compile(r"[^/]*(/\d*)?").fullmatch
_SENTINEL_LOCATION = re.compile(r"[^/]*/[\w.-]+(/\d*)?").fullmatch
_UNIX_LOCATION = re.compile(r"([^/]*@)?(/.*)?").fullmatch
_ENCODE: Final = (
    "expected scheme://user:password@host:port/db, or unix://user:password@/path/of/socket, with "
    "the special characters of the password percent-encoded (# as %23, / as %2F, ? as %3F)"
)
_ENCODE_SENTINEL: Final = (
    "expected scheme://user:password@host:port,host:port/NAME or the same with /db, where NAME is "
    "what the Sentinels call the primary, with the special characters of the password "
    "percent-encoded"
)


class Address(NamedTuple):
    """Host and port of a server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """The address of a cluster, or of Sentinels that know a primary, in its parts.

        redis+cluster://user:password@host:port,host:port
        redis+sentinel://user:password@host:port,host:port/NAME/database

    Attributes:
        scheme: of the address.
        credentials: user and password of the servers, with their @.
        nodes: some nodes of the cluster, or some of the Sentinels.
        path: of the address: the name of the primary, and the database.
        options: the query for the servers.
        sentinel_options: user and password of the Sentinels.
    """

    scheme: str
    credentials: str
    nodes: tuple[Address, ...]
    path: str
    options: str
    sentinel_options: dict[str, str]

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """Parse an address that passed `check_address`.

        Raises:
            StoreRefused: a host is invalid, or a cluster's database is not 0.
        """
        scheme, _, rest = url.partition("://")
        authority, _, query = rest.partition("?")
        credentials, at, location = authority.rpartition("@")
        hosts, _, path = location.partition("/")
        is_cluster = scheme in CLUSTER_SCHEMES
        if is_cluster and path.strip("/0"):
            raise StoreRefused("a cluster has database 0 only, expected no other in its address")
        options = [(each, each.partition("=")[0] in SENTINEL_OPTIONS) for each in _options(query)]
        of_sentinels = parse_qsl("&".join(each for each, is_theirs in options if is_theirs))
        return cls(
            scheme,
            credentials + at,
            _parse_nodes(hosts, CLUSTER_PORT if is_cluster else SENTINEL_PORT),
            path,
            "&".join(each for each, is_theirs in options if not is_theirs),
            {name.removeprefix("sentinel_"): value for name, value in of_sentinels},
        )

    @property
    def is_tls(self) -> bool:
        """Whether servers, and Sentinels, are connected to over TLS."""
        return self.scheme.startswith("rediss")

    @property
    def primary_name(self) -> str:
        """The name of the primary in the configuration of the Sentinels."""
        return self.path.partition("/")[0]

    def server_url(self, server: Address) -> str:
        """The address of one server."""
        scheme, _, kind = self.scheme.partition("+")
        database = self.path.partition("/")[2] if kind == "sentinel" else self.path
        query = f"?{self.options}" if self.options else ""
        return f"{scheme}://{self.credentials}{server}/{database or 0}{query}"

    def __str__(self) -> str:
        """The address without secrets and options."""
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{','.join(map(str, self.nodes))}{path}"


def _parse_nodes(hosts: str, default_port: int) -> tuple[Address, ...]:
    nodes: list[Address] = []
    for number, text in enumerate(hosts.split(","), start=1):
        try:
            parsed = urlsplit(f"//{text}")
            if not parsed.hostname:
                raise ValueError("no host")
            nodes.append(Address(parsed.hostname, parsed.port or default_port))
        except ValueError:
            # not shown: it may be part of a password with an @ or ? that is not encoded
            raise StoreRefused(
                f"expected host:port[,host:port...] in the store's address, and node {number} of "
                "it is invalid"
            ) from None
    return tuple(nodes)


def check_address(url: str) -> None:
    """Reject an address that cannot be parsed or has unknown options.

    Raises:
        ValueError: with a message that contains no part of the address.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in REDIS_SCHEMES or not separator:
        expected = ", ".join(f"{known}://" for known in REDIS_SCHEMES)
        raise ValueError(f"expected a URL that begins with one of {expected}")
    authority, _, query = rest.partition("?")
    is_sentinel = scheme in SENTINEL_SCHEMES
    is_location = _UNIX_LOCATION if scheme == "unix" else _TCP_LOCATION
    if is_sentinel:
        is_location = _SENTINEL_LOCATION
    if "#" in url or not is_location(authority) or not all("=" in each for each in _options(query)):
        raise ValueError(_ENCODE_SENTINEL if is_sentinel else _ENCODE)
    options = OPTIONS | SENTINEL_OPTIONS if is_sentinel else OPTIONS
    names = {each.partition("=")[0] for each in _options(query)}
    if not all(name in options or name.startswith("ssl_") for name in names):
        raise ValueError(
            f"expected only the options {', '.join(sorted(options))} and ssl_* in the address"
        )
    if not is_sentinel and scheme not in CLUSTER_SCHEMES:
        try:
            _ = urlsplit(url).port
        except ValueError:
            raise ValueError(_ENCODE) from None


def add_password(url: str, password: str) -> str:
    """Add a password to an address that passed `check_address`.

    Raises:
        ValueError: the address has a password already; no part of either is in the message.
    """
    scheme, _, rest = url.partition("://")
    authority, question_mark, query = rest.partition("?")
    user, at, location = authority.rpartition("@")
    if ":" in user or any(each.startswith("password=") for each in _options(query)):
        raise ValueError("expected no password in the store's address, since a file has it")
    location = location if at else authority
    return f"{scheme}://{user}:{quote(password, safe='')}@{location}{question_mark}{query}"


def add_sentinel_password(url: str, password: str) -> str:
    """Add the password of the Sentinels to an address that passed `check_address`.

    Raises:
        ValueError: it is not one of Sentinels, or has a password already; no part of either is in
            the message.
    """
    if url.partition("://")[0] not in SENTINEL_SCHEMES:
        raise ValueError("expected redis+sentinel:// or rediss+sentinel:// as the store's address")
    query = url.partition("?")[2]
    if any(each.startswith("sentinel_password=") for each in _options(query)):
        raise ValueError("expected no sentinel_password in the store's address: a file has it")
    return f"{url}{'&' if query else '?'}sentinel_password={quote(password, safe='')}"


def add_password_of(
    file: Path, url: str | None, add: Callable[[str, str], str] = add_password
) -> str:
    """Add the password in the first line of a file to an address that passed `check_address`.

    Raises:
        ValueError: the file has none, or there is no address without one.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            password = lines.readline(MAX_PASSWORD + 1).removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"expected a file with a password in its first line: {reason}") from None
    if len(password) > MAX_PASSWORD:
        raise ValueError(f"expected a password of at most {MAX_PASSWORD} characters, got more")
    if not password:
        raise ValueError("expected a password in the file's first line, which is empty")
    if url is None:
        raise ValueError("expected CARRY_REDIS_URL too: the embedded Valkey has no password")
    return add(url, password)


def redact_url(url: str) -> str:
    """Redact an address: replace its password, in the authority or in the query, by `***`.

    Options that are not known to be harmless are redacted too; of an address that cannot be parsed,
    only the scheme is kept.
    """
    scheme, separator, rest = url.partition("://")
    authority, question_mark, query = rest.partition("?")
    credentials, at, location = authority.rpartition("@")
    if not separator or "#" in url or ("@" in query and not at):
        return f"{scheme if separator else ''}://***"
    user, colon, _ = credentials.partition(":")
    redacted = f"{scheme}://{user}{colon and ':***'}{at}{location}{question_mark}"
    return redacted + "&".join(
        each if _IS_HARMLESS(each.partition("=")[0]) else f"{each.partition('=')[0]}=***"
        for each in _options(query)
    )


def check_tls_files(url: str) -> None:
    """Check the files that the TLS options of an address name.

    OpenSSL names neither the file nor the option, and a client that retries reports a missing file
    as an unavailable store. Each connection verifies dates, and what Python requires of a CA
    certificate.

    Raises:
        StoreRefused: naming the option and the file that is missing or invalid.
    """
    options = dict(parse_qsl(url.partition("?")[2]))
    files = {name: options[name] for name in TLS_FILES if name in options}
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


def _options(query: str) -> list[str]:
    return query.split("&") if query else []
