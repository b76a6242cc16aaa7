"""``fellrec ui``: the MLflow UI on the store that the runs were logged to."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from fellrec.cli.arguments import add_overrides
from fellrec.errors import ConfigError

PURPOSE = "open the MLflow UI on the tracking store"
EXAMPLES = (
    "fellrec ui",
    "fellrec ui tracking.uri=sqlite:///other.db --port 5001",
    "fellrec ui --host 0.0.0.0 --allowed-hosts node17,node17.cluster",
)

_EVERYWHERE = ("0.0.0.0", "::", "")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser, lists_groups=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    parser.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        default="",
        help="names of this machine, separated by commas, under which browsers and runs may use the server, besides "
        "localhost and --host (default: those of MLFLOW_SERVER_ALLOWED_HOSTS)",
    )


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: becomes the process of the server.

    Raises:
        ConfigError: If there is no store that needs a server, or the port cannot be used.
    """
    from fellrec.config.compose import compose
    from fellrec.tracking.store import ui_command, ui_environment

    uri = compose(options.overrides).tracking.uri
    if uri is None or uri.startswith("http"):
        raise ConfigError(f"tracking.uri={uri} is " + ("no store" if uri is None else "a server: open it in a browser"))
    _check_port(options.host, options.port)
    names = _names(options.host, options.allowed_hosts)
    sys.stderr.write(
        f"MLflow UI on http://{options.host}:{options.port} for {uri}, under the name "
        f"{', '.join(names) or 'localhost'} (others: --allowed-hosts, or MLFLOW_SERVER_ALLOWED_HOSTS); "
        "stop it with Ctrl-C\n"
    )
    sys.stderr.flush()
    command = ui_command(uri, options.host, options.port, names)
    os.execve(command[0], command, ui_environment(uri))


def _names(host: str, allowed: str) -> Sequence[str]:
    """Names that were given, and the host if it is one; the server answers no others, see DNS rebinding."""
    given = [name.strip() for name in (allowed or os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "")).split(",")]
    own = [host] if host not in (*_EVERYWHERE, *_LOOPBACK) else []
    return list(dict.fromkeys(name for name in (*own, *given) if name))


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is in use; MLflow's server would end without an error.

    Raises:
        ConfigError: If the port cannot be used.
    """
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port} is not allowed: a whole number from 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be used: {error.strerror or error}") from error
