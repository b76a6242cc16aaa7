"""The command line: ``fellrec VERB [OVERRIDE ...]``. Verbs import what they need when they are called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from fellrec.errors import ConfigError, FellrecError, Preempted

_PATIENCE_SECONDS = 10.0
"""How long rank 0 may take to say what is wrong before its launcher sees another rank end, and ends rank 0 too."""

VERBS = {
    "prepare": "read a data set, verify its counts, print statistics, cache it",
    "train": "one federated run (-m: a Hydra multirun over comma-separated values)",
    "compare": "several rules and seeds on one partition, one table with the reference rankers",
    "evaluate": "score a finished run's adapters again on the validation or test holdout",
    "export": "a finished run's rankings and targets as files of ranx, RecBole or TREC",
    "plan": "storage, memory, traffic and time of a run, before anything is launched",
    "submit": "a run, or a sweep as a job array, on SLURM",
    "ui": "open the MLflow UI on the runs' store",
    "sync": "send to MLflow what runs have kept while the tracking server was away",
    "doctor": "check the installation, devices, folders and the tracking store",
}

_EXAMPLES = {
    "prepare": [
        "fellrec prepare data=ml_1m data.root=ml-1m",
        "fellrec prepare data=ml_100k data.root=ml-100k data.core=5",
    ],
    "train": [
        "fellrec train aggregation=fedavg trainer.num_rounds=3",
        "fellrec train data=ml_100k data.root=ml-100k backbone=hf backbone.path=MODEL_FOLDER",
        "fellrec train -m aggregation=fedavg,fellrec aggregation.alpha=0.3,0.7",
        "fellrec train resume=runs/RUN",
    ],
    "compare": [
        "fellrec compare",
        "fellrec compare data=ml_1m data.root=ml-1m aggregation=local,fedavg,fellrec,centralized seed=0,1,2",
        "fellrec compare experiment=ml_1m_small data.root=ml-1m --format json",
        "fellrec compare aggregation=fedavg,fellrec trainer.learning_rate=1e-3,2e-3",
        "fellrec compare --run 'aggregation=fedavg trainer.learning_rate=2e-3' --run 'aggregation=fellrec'",
    ],
    "evaluate": ["fellrec evaluate runs/RUN", "fellrec evaluate runs/RUN --stage val --format json"],
    "export": ["fellrec export runs/RUN --format ranx", "fellrec export runs/RUN --format trec --output FOLDER"],
    "plan": [
        "fellrec plan data=ml_1m data.root=ml-1m backbone=hf backbone.config=llama_2_7b split.head_layers=1,2,4,8,20",
        "fellrec plan backbone=hf backbone.path=MODEL_FOLDER split.head_layers=1,2 --format json",
        "fellrec plan split.head_layers=1,2 --probe 5",
    ],
    "submit": [
        "fellrec submit experiment=ml_1m_small data.root=ml-1m launcher.gpus_per_node=1 launcher.time=12:00:00",
        "fellrec submit split=executed split.transport=distributed launcher.nodes=2 --dry-run",
        "fellrec submit -m aggregation=fedavg,fellrec seed=0,1,2 launcher.time=2:00:00 launcher.max_parallel=4",
        "fellrec submit resume=runs/RUN launcher.time=12:00:00",
    ],
    "ui": ["fellrec ui", "fellrec ui tracking.uri=sqlite:///other.db --port 5001"],
    "sync": ["fellrec sync runs/RUN", "fellrec sync runs/* --uri http://127.0.0.1:5000"],
    "doctor": ["fellrec doctor", "fellrec doctor tracking.uri=http://127.0.0.1:5000 run_dir=/scratch/runs"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit.

    0: it succeeded. 1: an error that the user can mend. 2: wrong words. 75: stopped by SIGUSR1, to be started again;
    143: stopped by SIGTERM; 130: by Ctrl-C. After these a run can be resumed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    options.arguments = given  # for the processes of the same command
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("fellrec").setLevel(logging.DEBUG if options.debug else logging.NOTSET)
    _quieten(options.verbose)
    try:
        command = importlib.import_module(f"fellrec.cli.{options.verb}")
        command.run(options)
    except Exception as error:
        if not _has_peers() and (options.debug or not isinstance(error, FellrecError)):
            raise
        _leave(_report(error, options))
    except KeyboardInterrupt as stop:
        if options.debug:
            raise
        why = stop if isinstance(stop, Preempted) else "interrupted"
        sys.stderr.write(f"\nfellrec {options.verb}: {why}\n")
        _leave(stop.exit_code if isinstance(stop, Preempted) else 130)
    except SystemExit as stop:
        if not _has_peers():
            raise
        _leave(stop.code if isinstance(stop.code, int) else 1)
    _leave(0)


def _report(error: Exception, options: argparse.Namespace) -> int:
    """Say what ended the run, if nobody else does; gives the exit status."""
    if options.debug or not isinstance(error, FellrecError):
        traceback.print_exception(error)
    elif _is_rank_0s_to_say(error):
        time.sleep(_PATIENCE_SECONDS)
    elif not error.already_reported:
        sys.stderr.write(f"fellrec {options.verb}: {error}\n")
    return 1


def _parse(given: list[str]) -> argparse.Namespace:
    """Like ``parse_args``, with overrides before and after options."""
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}; see fellrec {options.verb} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fellrec",
        description="Federated LLM-based recommendation. Settings are Hydra overrides: GROUP=CHOICE, GROUP.KEY=VALUE.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        sub = verbs.add_parser(
            verb,
            help=purpose,
            description=purpose[0].upper() + purpose[1:] + ".",
            epilog=_epilog(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(sub, verb)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="log what is done")
    return parser


def _add_arguments(sub: argparse.ArgumentParser, verb: str) -> None:
    if verb == "evaluate":
        sub.add_argument("run_dir", metavar="RUN_DIR", help="directory of a finished run")
        sub.add_argument("--stage", choices=("val", "test"), default="test", help="holdout (default: test)")
    elif verb == "export":
        sub.add_argument("run_dir", metavar="RUN_DIR", help="directory of a finished run")
        sub.add_argument("--format", choices=("ranx", "recbole", "trec"), required=True, help="which tool's files")
        sub.add_argument("--output", metavar="PATH", help="folder to write to (default: RUN_DIR/export/FORMAT)")
    elif verb == "sync":
        sub.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directory of a run or of a comparison")
        sub.add_argument("--uri", help="where the server is now (default: where the run was started to log to)")
    else:
        sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=CHOICE or GROUP.KEY=VALUE")
    if verb in ("compare", "evaluate", "plan", "train", "prepare"):
        sub.add_argument(
            "--format", choices=("table", "json"), default="table", help="json: results only, on standard output"
        )
    if verb == "compare":
        sub.add_argument(
            "--run",
            action="append",
            metavar="OVERRIDES",
            help="overrides of one rule, in quotes; give one --run for each (combined with the other overrides)",
        )
    if verb in ("train", "submit"):
        sub.add_argument("-m", "--multirun", action="store_true", help="one run per combination of values")
    if verb == "submit":
        sub.add_argument("--dry-run", action="store_true", help="show the batch script and do nothing")
    if verb in ("train", "compare"):
        sub.add_argument("--show-config", action="store_true", help="print the composed configuration and stop")
    if verb == "plan":
        sub.add_argument(
            "--probe", type=int, metavar="STEPS", help="time so many local steps of the largest client (needs weights)"
        )
    if verb == "ui":
        sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
        sub.add_argument("--port", type=int, default=5000, help="port (default: 5000)")


def _epilog(verb: str) -> str:
    lines = ["examples:", *(f"  {example}" for example in _EXAMPLES[verb])]
    if verb in ("train", "compare", "plan", "prepare", "submit"):
        lines += ["", "groups and their choices:", *_groups()]
        lines += ["", "`fellrec train --show-config` prints every setting with its value."]
    return "\n".join(lines)


def _groups() -> list[str]:
    from fellrec.config.paths import group_choices

    return [f"  {group:<14} {', '.join(choices)}" for group, choices in group_choices().items()]


def _leave(code: int) -> None:
    """Exit if something went wrong; at once where threads may still wait for other processes of a distributed run."""
    if _has_peers():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _is_rank_0s_to_say(error: FellrecError) -> bool:
    """Whether all processes of the run find the same wrong: a setting, before they have met."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    return rank > 0 and isinstance(error, ConfigError) and not _has_peers()


def _has_peers() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _quieten(verbose: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not verbose:
        for name in ("lightning", "lightning.fabric", "lightning.pytorch", "mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
