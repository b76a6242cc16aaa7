"""``fellrec ui``: the MLflow UI on the store that the runs were logged to."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fellrec.cli.arguments import add_overrides
from fellrec.errors import ConfigError
from fellrec.tracking.links import UI_PORT, runs_page

PURPOSE = "open the MLflow UI on the tracking store"
EXAMPLES = (
    "fellrec ui",
    "fellrec ui tracking.uri=sqlite:///other.db --port 5001",
    "fellrec ui --host 0.0.0.0 --allowed-hosts node17,node17.cluster",
)

_EVERYWHERE = ("0.0.0.0", "::", "")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 10.0
"""How long the server may take to stop before it is killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser, lists_groups=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=UI_PORT, help=f"port (default: {UI_PORT})")
    parser.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        default="",
        help="names of this machine, separated by commas, under which browsers and runs may use the server, besides "
        "localhost and --host (default: those of MLFLOW_SERVER_ALLOWED_HOSTS)",
    )


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: waits for the server, and hands signals on to it.

    Raises:
        ConfigError: If there is no store that needs a server, or the port cannot be used.
    """
    from fellrec.config.compose import compose
    from fellrec.tracking.store import experiment_id, ui_command, ui_environment

    tracking = compose(options.overrides).tracking
    uri = tracking.uri
    if uri is None or uri.startswith("http"):
        raise ConfigError(f"tracking.uri={uri} is " + ("no store" if uri is None else "a server: open it in a browser"))
    _check_port(options.host, options.port)
    names = _names(options.host, options.allowed_hosts)
    name = options.host if options.host in _LOOPBACK else next(iter(names), "127.0.0.1")
    address = f"http://{f'[{name}]' if ':' in name else name}:{options.port}"
    sys.stderr.write(
        f"MLflow UI for {uri}, on --host {options.host} --port {options.port}, under the name "
        f"{', '.join(names) or 'localhost'} (others: --allowed-hosts, or MLFLOW_SERVER_ALLOWED_HOSTS); "
        f"stop it with Ctrl-C\nRuns: {runs_page(address, experiment_id(uri, tracking.experiment))}\n"
    )
    sys.stderr.flush()
    if status := _serve(ui_command(uri, options.host, options.port, names), ui_environment(uri)):
        sys.exit(status)


def _serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the server as a process group of its own until it ends or this process is told to stop.

    MLflow's command does not hand signals on: if it alone were stopped, its workers would keep the port. Every signal
    is handed on as SIGTERM: at SIGINT each process of MLflow would print a traceback.

    Returns:
        The exit status: the server's, or 128 and the number of the signal.
    """
    received: list[int] = []
    server: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: object) -> None:
        """Hand the signal on; one that comes before the server exists is handed on below."""
        received.append(number)
        if server is not None:
            _signal(server.pid, signal.SIGTERM)

    for number in _STOP:
        signal.signal(number, stop)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    if received:
        _signal(server.pid, signal.SIGTERM)
    while not received and server.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.5)
    with suppress(subprocess.TimeoutExpired):
        server.wait(_GRACE_SECONDS)
    _signal(server.pid, signal.SIGKILL)  # what is left of the group
    status = server.wait()
    return 128 + received[0] if received else abs(status)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


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
