"""The command line: ``fellrec VERB [OVERRIDE ...]``.

The module of each verb imports torch and other heavy packages inside its functions, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import NoReturn

from fellrec.errors import ConfigError, FellrecError, Preempted, printable, shorten
from fellrec.functional.secrets import redact
from fellrec.launch.preemption import INTERRUPT
from fellrec.terminal import be_quiet

_PLACES = (
    "LOCAL_RANK",
    "SLURM_LOCALID",
    "JSM_NAMESPACE_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
)
"""Variables with this process's number on its node: of torchrun, srun, jsrun, and mpirun of Open MPI and MPICH."""
_BROKEN_PIPE = 141
"""Exit status if the reader of the output has closed the pipe, such as ``| head``: 128 + SIGPIPE, as in a shell."""

VERBS = (
    "prepare",
    "train",
    "compare",
    "evaluate",
    "recommend",
    "attack",
    "export",
    "report",
    "plan",
    "submit",
    "ui",
    "sync",
    "list",
    "show",
    "check-rule",
    "doctor",
    "completion",
)
"""Each is a module of this package, with ``_`` for ``-``, and has ``PURPOSE``, ``EXAMPLES``,
``add_arguments(parser)`` and ``run(options)``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit.

    Modules of the current directory can be named as ``_target_``. Ctrl-C several times within a second counts once.
    Only the user can read files that a command creates: most have interactions of users.

    Exit status: 0 for success, 1 for an error, 2 for wrong arguments. A run that was stopped by SIGUSR1 (75), SIGTERM
    (143) or Ctrl-C (130) can be resumed.

    Args:
        arguments: Command line without the program's name; ``None`` for that of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_whole_process = arguments is None
    if is_whole_process and not sys.flags.safe_path and "" not in sys.path:
        sys.path.append("")  # the current directory, for modules of the user's own; the last place that is looked in
    if is_whole_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, INTERRUPT)
    try:
        options = _parse(given)
    except KeyboardInterrupt:
        sys.stderr.write("\nfellrec: interrupted\n")
        sys.exit(130)
    options.arguments = given  # for the processes of the same command
    logging.basicConfig(level=_level(options), format="%(levelname)s %(message)s")
    logging.getLogger("fellrec").setLevel(logging.DEBUG if options.debug else logging.NOTSET)
    _set_log_levels(options.verbose)
    be_quiet(options.quiet)
    _keep_secrets()
    umask = os.umask(0o077)
    try:
        _run(options, is_whole_process)
    except Exception as raised:
        error = raised if options.debug else _of_memory(raised) or raised
        if not _is_distributed() and (options.debug or not isinstance(error, FellrecError)):
            raise
        _exit(_report(error, options))
    except KeyboardInterrupt as stop:
        if is_whole_process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the message is whole
        if options.debug:
            raise
        why = stop if isinstance(stop, Preempted) else "interrupted"
        sys.stderr.write(f"\nfellrec {options.verb}: {why}\n")
        _exit(stop.exit_code if isinstance(stop, Preempted) else 130)
    except SystemExit as stop:
        if not _is_distributed():
            raise
        _exit(stop.code if isinstance(stop.code, int) else 1)
    finally:
        os.umask(umask)
        if is_whole_process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # exit handlers, such as MLflow's, are not interrupted
    _exit(0)


def _run(options: argparse.Namespace, is_whole_process: bool) -> None:
    """Run the verb; exit if the reader of its output has closed the pipe."""
    command = importlib.import_module(_module(options.verb))
    try:
        with warnings.catch_warnings():
            if options.quiet:
                warnings.simplefilter("ignore")
            command.run(options)
        if is_whole_process:
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_whole_process or not _has_no_reader():
            raise
        _exit(_BROKEN_PIPE)


def _has_no_reader() -> bool:
    """Whether the reader of the standard output has closed the pipe; if so, further output is discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    is_left = any(event & select.POLLERR for _, event in output.poll(0))
    if is_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_left


def _module(verb: str) -> str:
    """The module of a verb."""
    return f"fellrec.cli.{verb.replace('-', '_')}"


def _of_memory(error: Exception) -> FellrecError | None:
    """The user's error for a lack of memory, on the GPU or not; ``None`` for any other."""
    is_on_gpu = type(error).__name__ == "OutOfMemoryError"
    if not is_on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        return None
    where, text = "GPU memory" if is_on_gpu else "memory", shorten(" ".join(str(error).split()), 160)
    return FellrecError(
        f"out of {where}: use a smaller backbone, data.max_history, trainer.batch_size or trainer.eval_batch_size, or "
        f"see fellrec plan and --debug ({text})"
    )


def _report(error: Exception, options: argparse.Namespace) -> int:
    """Print the error, unless another process of the run prints it; returns the exit status."""
    if options.debug or not isinstance(error, FellrecError):
        _print_traceback(type(error), error, error.__traceback__)
    elif _is_reported_by_another(error):
        return 0  # the launcher must not terminate the process that prints the error
    elif not error.already_reported:
        sys.stderr.write(f"fellrec {options.verb}: {error}\n")
    return 1


def _parse(given: list[str]) -> argparse.Namespace:
    """Like ``parse_args``, with overrides before and after options."""
    parser = command_parser().whole
    if not given:
        parser.print_help()
        sys.exit(0)
    options, rest = parser.parse_known_args(given)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}; see fellrec {options.verb} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


@dataclass(frozen=True)
class CommandParser:
    """The parser of the command line.

    Attributes:
        whole: Of all words.
        verbs: Of each verb.
    """

    whole: argparse.ArgumentParser
    verbs: Mapping[str, argparse.ArgumentParser]


class _Parser(argparse.ArgumentParser):
    """Names the verb that a wrong one is most like."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2."""
        found = re.search(r"argument VERB: invalid choice: '([^']*)'", message)
        if found:
            close = get_close_matches(found[1], VERBS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from: {', '.join(VERBS)}"
            message = f"unknown verb {shorten(found[1])!r}; {hint}"
        super().error(message)


def command_parser() -> CommandParser:
    """The parser with all verbs; imports nothing heavy."""
    parser = _Parser(
        prog="fellrec",
        description="Federated LLM-based recommendation. Settings are Hydra overrides: GROUP=CHOICE, GROUP.KEY=VALUE.",
        epilog="Start with `fellrec compare experiment=first_look`; `fellrec list` shows what can be chosen.",
    )
    parser.add_argument("--version", action="version", version=f"fellrec {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=argparse.ArgumentParser)
    found = {}
    for name in VERBS:
        verb = importlib.import_module(_module(name))
        sub = found[name] = verbs.add_parser(
            name,
            help=verb.PURPOSE,
            description=f"{verb.PURPOSE[0].upper()}{verb.PURPOSE[1:]}.",
            epilog="\n".join(["examples:", *(f"  {example}" for example in verb.EXAMPLES)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="show log messages of level INFO")
        sub.add_argument("--quiet", action="store_true", help="show results and errors, no progress and no warnings")
    return CommandParser(parser, found)


def _version() -> str:
    return str(importlib.import_module("fellrec").__version__)


def _level(options: argparse.Namespace) -> int:
    """The lowest level of log messages that are shown."""
    return logging.ERROR if options.quiet else logging.INFO if options.verbose else logging.WARNING


def _exit(code: int) -> None:
    """Exit if the status is not 0; a distributed run exits at once, without waiting for its threads."""
    if _is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _is_reported_by_another(error: FellrecError) -> bool:
    """Whether the first process of this node raises the same error: a wrong setting, before processes are connected."""
    places = [int(os.environ[name]) for name in _PLACES if name in os.environ]
    return sum(places[:1]) > 0 and isinstance(error, ConfigError) and not _is_distributed()


def _is_distributed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _keep_secrets() -> None:
    """Remove passwords from log messages and tracebacks, those of other libraries included."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _Redacting) for known in handler.filters):
            handler.addFilter(_Redacting())
    sys.excepthook = _print_traceback


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record's message; every record passes."""
        record.msg, record.args = printable(redact(record.getMessage())), ()
        return True


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _set_log_levels(verbose: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not verbose:
        for name in ("lightning", "lightning.fabric", "lightning.pytorch", "mlflow", "alembic", "bitsandbytes"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
