"""Python processes that start at once: forks of one process that has imported what takes seconds to import."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fellrec.experiment.run", "fellrec.cli.train", "mlflow.tracking.client"])


class Preloaded:
    """What `subprocess.Popen` is for ``python ARGUMENTS``, as far as tests need it.

    A process of its own with its own signals and exit code; only its imports are those of the process it was forked
    from, so it is not for a test of what is imported, of memory, or of what the environment sets at import.

    Args:
        arguments: Those of ``python``: ``-m`` and a module, or a script, and its arguments.
        cwd: Its working directory.
        env: Its environment.
        output: A file that takes what it prints; without one, ``stdout`` is a pipe to read it from.
    """

    stdout: IO[str]

    def __init__(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], output: IO[bytes] | None = None
    ) -> None:
        reading, writing = _CONTEXT.Pipe(duplex=False)
        if output is not None:
            writing.close()
            writing = Connection(os.dup(output.fileno()), readable=False)
        with writing:
            self._process = _CONTEXT.Process(target=_run, args=(list(arguments), str(cwd), dict(env), writing))
            self._process.start()
        with reading:
            self.stdout = os.fdopen(os.dup(reading.fileno()))
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; negative for the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its exit code, ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: If it has not ended in time.
        """
        self._process.join(timeout)
        code = self._process.exitcode
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


def _run(arguments: list[str], cwd: str, env: dict[str, str], output: Connection) -> None:
    """In the new process: be ``python ARGUMENTS``."""
    with output:
        os.dup2(output.fileno(), 1)
    os.dup2(1, 2)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
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
