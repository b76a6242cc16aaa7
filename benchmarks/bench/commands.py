"""Seconds of whole commands, ours and the rivals' in turn, with the losses and evaluations of each."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environments import ROOT, Environment
from bench.measure import Seconds, run
from bench.settings import COMMAND, is_frozen, overrides_of

_NOT_KEPT = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "FELLREC_CACHE")
_CLIENT = re.compile(r"train/loss/client/(\d+)")


@dataclass
class Found:
    """Seconds of one command in all repeats, and what it reported in the first."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    ndcg: list[float] = field(default_factory=list)


def environment(**more: str) -> dict[str, str]:
    """Of a command: one thread, this source tree, no network; compiled modules are kept, as for a user."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks"))
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_KEPT}
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **more}


def fellrec(*arguments: str) -> list[str]:
    """The command line of fellrec in this environment."""
    return [sys.executable, "-m", "fellrec", *arguments]


def checked(seconds: Seconds, what: str, status: int = 0) -> Seconds:
    """The seconds of a command that ended as it should.

    Raises:
        RuntimeError: If it did not.
    """
    if seconds.status != status:
        raise RuntimeError(f"{what} ended with status {seconds.status}:\n{seconds.output[-2000:]}")
    return seconds


def reported(run_dir: Path) -> tuple[list[list[float]], list[float]]:
    """Losses by round and client, and NDCG@10 of each evaluation, of a finished run of fellrec."""
    losses: dict[int, dict[int, float]] = {}
    val, test = {}, []
    for line in (run_dir / "outbox" / "operations.jsonl").read_text().splitlines():
        operation = json.loads(line)
        metrics, step = operation.get("metrics") or {}, operation.get("step")
        for name, value in metrics.items():
            if found := _CLIENT.fullmatch(name):
                losses.setdefault(step, {})[int(found[1])] = value
            elif name == "val/ndcg_at_10/mean":
                val[step] = value
            elif name == "test/ndcg_at_10/mean":
                test.append(value)
    by_round = [[losses[step][client] for client in sorted(losses[step])] for step in sorted(losses)]
    return by_round, [val[step] for step in sorted(val)] + test[:1]


def compete(
    work: Path, rivals: Mapping[str, Environment], repeats: int, overrides: Sequence[str] = ()
) -> dict[str, Found]:
    """Run fellrec's whole command and those of the rivals in turn.

    Args:
        work: Folder for workloads, runs and environments.
        rivals: Environment of each rival, by the name of its module.
        repeats: How often.
        overrides: The user's.
    """
    all_overrides, workload = overrides_of("retrieval", COMMAND, overrides), work / "workloads" / "command"
    if not is_frozen(workload, all_overrides):
        command = [sys.executable, "-m", "bench.workload", str(workload), *all_overrides]
        checked(run(command, work / "commands" / "workload", environment()), "freezing the workload")
    found = {name: Found() for name in ("ours", *rivals)}
    for repeat in range(repeats):
        for name, one in found.items():
            folder = work / "commands" / name
            shutil.rmtree(folder, ignore_errors=True)
            if name == "ours":
                command = fellrec("train", *all_overrides, "run_dir=run")
                seconds = checked(run(command, folder, environment()), name)
                losses, ndcg = reported(folder / "run")
            else:
                command = [str(rivals[name].python), "-m", f"bench.{name}", str(workload), "result.json"]
                seconds = checked(run(command, folder, environment()), name)
                result: dict[str, Any] = json.loads((folder / "result.json").read_text())
                losses, ndcg = result["losses"], result["ndcg"]
            one.wall.append(seconds.wall)
            one.cpu.append(seconds.cpu)
            if repeat == 0:
                one.losses, one.ndcg = losses, ndcg
    return found


def profile(work: Path, root: Path) -> list[float]:
    """Utilisation in each round of ``ml_1m_small``, which ``callbacks=profile`` logs."""
    folder = work / "commands" / "profile"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = ("+callbacks=profile", "experiment=ml_1m_small", f"data.root={root.resolve()}", "references.show=[]")
    more = ("trainer.num_rounds=2", "trainer.evaluate_every=2", "run_dir=run")
    checked(run(fellrec("train", *arguments, *more), folder, environment()), "profile")
    lines = (folder / "run" / "outbox" / "operations.jsonl").read_text().splitlines()
    metrics = [json.loads(line).get("metrics") or {} for line in lines]
    return [found["train/profile/utilisation"] for found in metrics if "train/profile/utilisation" in found]


def time_command(work: Path, name: str, command: Sequence[str], repeats: int, status: int = 0) -> Found:
    """Run one command several times, each in a new folder."""
    found = Found()
    for _ in range(repeats):
        folder = work / "commands" / name
        shutil.rmtree(folder, ignore_errors=True)
        env = environment(FELLREC_CACHE=str(folder / "cache")) if name == "demo" else environment()
        seconds = checked(run(command, folder, env), name, status)
        found.wall.append(seconds.wall)
        found.cpu.append(seconds.cpu)
    return found


def in_process(work: Path, module: str, arguments: Sequence[str]) -> Any:
    """The JSON that a module of this package prints, in a process of its own."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    seconds = checked(run(command, work / "commands" / module, environment()), module)
    return json.loads(seconds.output.splitlines()[-1])
