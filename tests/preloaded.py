"""Python processes that start at once: forks of one process that has imported what takes seconds to import."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import IO
from unittest.mock import patch

_CONTEXT = multiprocessing.get_context("forkserver")
_LOCK = threading.Lock()
"""Starting a process asks the others whether they have ended, and an exit code can be read once."""

STAND_IN = "FELLREC_TESTS_PYTHON"
"""Variable with the `program` that a process takes for ``sys.executable``."""


class Preloaded:
    """What `subprocess.Popen` is for ``python ARGUMENTS``, as far as tests need it.

    A process of its own with its own signals and exit code; only its imports are those of the process it was forked
    from, so it is not for a test of what is imported, of memory, or of what the environment sets at import.

    Args:
        arguments: Those of ``python``: ``-m`` and a module, or a script, and its arguments.
        cwd: Its working directory.
        env: Its environment.
        output: A file that takes what it prints; without one, ``stdout`` is a pipe to read it from.
        errors: A file that takes what it prints to standard error; without one, that is where the rest goes.
    """

    stdout: IO[str]

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        output: IO[bytes] | None = None,
        errors: IO[bytes] | None = None,
    ) -> None:
        reading, writing = _CONTEXT.Pipe(duplex=False)
        if output is not None:
            writing.close()
            writing = Connection(os.dup(output.fileno()), readable=False)
        separate = None if errors is None else Connection(os.dup(errors.fileno()), readable=False)
        with writing, _LOCK:
            _start_server()
            given = (list(arguments), str(cwd), dict(env), writing, separate)
            self._process = _CONTEXT.Process(target=_run, args=given)
            self._process.start()
        if separate is not None:
            separate.close()
        with reading:
            self.stdout = os.fdopen(os.dup(reading.fileno()))
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; negative for the signal that ended it."""
        return self.poll()

    def poll(self) -> int | None:
        """Its exit code, ``None`` while it runs."""
        with _LOCK:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: If it has not ended in time.
        """
        if self.poll() is None:
            wait_for([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def finish(self) -> tuple[int, str]:
        """Read everything it prints to its end; gives its exit code too."""
        shown = self.stdout.read()
        return self.wait(), shown


def python(arguments: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Exit code and output, that to standard error too, of ``python ARGUMENTS``."""
    return Preloaded(arguments, cwd, env).finish()


@functools.cache
def _start_server() -> None:
    """Start the process that others are forked from; it imports the module ``preload``."""
    _CONTEXT.set_forkserver_preload(["preload"])
    with patch.dict(os.environ):
        folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)
        forkserver.ensure_running()


@functools.cache
def program() -> str:
    """A program for what starts ``python`` by its path: Fabric, torchrun, a shell script.

    It lets this process start a `Preloaded` one with its arguments, directory, environment and standard streams,
    passes signals on to it, and ends as it does.
    """
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    listening = socket.create_server(str(folder / "socket"), family=socket.AF_UNIX, backlog=64)
    threading.Thread(target=_serve, args=(listening,), daemon=True).start()
    path = folder / "python"
    path.write_text(f"#!{sys.executable} -IS\nPLACE = {str(folder / 'socket')!r}\n{_PROGRAM}")
    path.chmod(0o755)
    atexit.register(_remove, folder)
    return str(path)


_PROGRAM = """
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(PLACE)
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [1, 2])
server.sendall(request)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def _serve(listening: socket.socket) -> None:
    while True:
        threading.Thread(target=_carry_out, args=(listening.accept()[0],), daemon=True).start()


def _carry_out(asking: socket.socket) -> None:
    """Run what a program asks for; it is killed if the program is."""
    size, streams, _, _ = socket.recv_fds(asking, 8, 2)
    with asking, asking.makefile("rb") as reading, os.fdopen(streams[0], "wb") as output:
        with os.fdopen(streams[1], "wb") as errors:
            arguments, folder, env = json.loads(reading.read(int.from_bytes(size, "big")))
            options = [word for word in arguments if word != "-u"]
            process = Preloaded(options, Path(folder), env, output, errors)
        with suppress(ConnectionError):
            asking.sendall(f"{process.pid}\n".encode())
        wait_for([process._process.sentinel, asking])
        process.kill()
        with suppress(ConnectionError):
            asking.sendall(f"{process.wait()}\n".encode())


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _run(arguments: list[str], cwd: str, env: dict[str, str], output: Connection, errors: Connection | None) -> None:
    """In the new process: be ``python ARGUMENTS``."""
    assert "preload" in sys.modules, "it could not be imported"
    with output:
        os.dup2(output.fileno(), 1)
    os.dup2(1 if errors is None else errors.fileno(), 2)
    if errors is not None:
        errors.close()
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.executable = env.get(STAND_IN, sys.executable)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
