# SPDX-License-Identifier: Apache-2.0
"""nginx in front of vLLM: what it lets through, from a YAML file.

vLLM's own ``--api-key`` guards the paths under /v1 only, and nothing in vLLM bounds a
body or a slow sender. The rendered configuration lets a list of routes through.
"""

import ipaddress
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Literal

import jinja2
from pydantic import AfterValidator, Field

from ...calibrate.files import read_bytes
from ...errors import ConfigError, OutputError
from ...schema import StrictModel

TEMPLATE = Path(__file__).parent / "nginx.conf.j2"
MAX_KEYS_BYTES = 1 << 20
KEY_LINE = re.compile(r"([A-Za-z0-9_-]{1,32})[ \t]+([A-Za-z0-9_-]{24,128})[ \t]*")
ERRORS = {
    400: ("The request is not valid HTTP.", "invalid_request_error"),
    401: ("A key is missing or not known.", "authentication_error"),
    403: ("This is not allowed from here.", "permission_error"),
    404: ("There is no such route.", "not_found_error"),
    405: ("The route does not take this method.", "invalid_request_error"),
    408: ("The request came too slowly.", "timeout_error"),
    413: ("The body is too large.", "invalid_request_error"),
    429: ("Too many requests or connections.", "rate_limit_error"),
    502: ("No engine can be reached.", "server_error"),
    504: ("The engine took too long.", "server_error"),
}


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    name = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\*", host)
    if not name or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise ValueError("must be HOST:PORT")
    return value


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"must be an address or a network: {error}") from None


def _file(value: str) -> str:
    # What nginx reads unquoted; a relative path would depend on where it starts.
    if not re.fullmatch(r"/[A-Za-z0-9_./@+-]*", value):
        raise ValueError("must be an absolute path of letters, digits and _./@+-")
    return value


Address = Annotated[str, AfterValidator(_address)]
Network = Annotated[str, AfterValidator(_network)]
File = Annotated[str, AfterValidator(_file)]
# YAML has lists where a frozen model has tuples.
_LIST = Field(strict=False, min_length=1, max_length=256)


class Limits(StrictModel):
    """What one client may take."""

    body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 1 << 20
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 600
    """Per key, evened out; ``burst`` may come at once."""
    burst: Annotated[int, Field(ge=1, le=100_000)] = 60
    connections_per_key: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests in flight."""
    connections_per_address: Annotated[int, Field(ge=1, le=4096)] = 64
    header_seconds: Annotated[int, Field(ge=1, le=600)] = 10
    """For all headers."""
    body_seconds: Annotated[int, Field(ge=1, le=600)] = 10
    """Between two parts of a body."""
    send_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    """A client that takes nothing for so long is cut off."""
    answer_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """Until the first token, and between two."""


class Metrics(StrictModel):
    """/metrics of each engine as /metrics/0, /metrics/1, ..., for inside only."""

    listen: Address = "127.0.0.1:9180"
    allow: Annotated[tuple[Network, ...], _LIST] = ("127.0.0.1/32",)


class TLS(StrictModel):
    """PEM files."""

    certificate: File
    key: File


class Route(StrictModel):
    """A path that is let through with a key."""

    path: str = Field(pattern=r"^/v1(/[a-z][a-z0-9_-]*)+$")
    method: Literal["GET", "POST"]


ROUTES = (
    Route(path="/v1/models", method="GET"),
    Route(path="/v1/completions", method="POST"),
    Route(path="/v1/chat/completions", method="POST"),
    Route(path="/v1/responses", method="POST"),
)


class FrontDoor(StrictModel):
    """The file people edit; ``front-door.yaml`` beside this module is one."""

    listen: Address = "127.0.0.1:8080"
    upstreams: Annotated[tuple[Address, ...], _LIST]
    keys_file: File
    """Lines of a name and a key; the name goes into the log."""
    runtime_dir: File = "/tmp/lowbit-front-door"
    """For the process id and bodies on their way."""
    access_log: File = "/dev/stdout"
    error_log: File = "/dev/stderr"
    trusted_proxies: Annotated[tuple[Network, ...], Field(strict=False)] = ()
    """Load balancers whose X-Forwarded-For is believed."""
    tls: TLS | None = None
    metrics: Metrics | None = None
    limits: Limits = Limits()
    routes: Annotated[tuple[Route, ...], _LIST] = ROUTES


def read_keys(path: Path) -> dict[str, str]:
    """Key to name, from a file of lines ``NAME KEY``; ``#`` starts a comment line.

    Raises:
        ConfigError: naming the line, never a key; also when others may read the file.
    """
    data = read_bytes(path, MAX_KEYS_BYTES)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & stat.S_IROTH:
        raise ConfigError(
            f"{path}: every user may read it (mode {mode:04o}); chmod 640 or less"
        )
    keys: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = KEY_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"{path}:{number}: must be a name and a key of 24 to 128 letters, "
                "digits, - and _"
            )
        if match[2] in keys:
            raise ConfigError(
                f"{path}:{number}: the key is that of {keys[match[2]]} already"
            )
        keys[match[2]] = match[1]
    if not keys:
        raise ConfigError(f"{path}: holds no key")
    return keys


def render(config: FrontDoor, keys: dict[str, str], directory: Path) -> Path:
    """Write ``nginx.conf`` and ``keys.conf`` (readable by the owner alone).

    Raises:
        ConfigError: for a directory whose name nginx could not read.
        OutputError: when a file cannot be written.
    """
    try:
        directory = Path(_file(str(directory.absolute())))
    except ValueError as error:
        raise ConfigError(f"{directory}: {error}") from None
    # A string in a map matches in either case; a regular expression does not.
    entries = "".join(f'    "~^Bearer {k}\\z" {name};\n' for k, name in keys.items())
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.from_string(TEMPLATE.read_text()).render(
        **dict(config),
        runtime=config.runtime_dir,
        keys=directory / "keys.conf",
        errors=ERRORS,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        Path(config.runtime_dir).mkdir(parents=True, exist_ok=True)
        _write(
            directory / "keys.conf",
            'map $http_authorization $client {\n    default "";\n' + entries + "}\n",
        )
        _write(directory / "nginx.conf", text)
    except OSError as error:
        raise OutputError(
            f"{error.filename}: cannot be written: {error.strerror}"
        ) from None
    return directory / "nginx.conf"


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)
