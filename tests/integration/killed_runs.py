"""Runs that kill themselves: reads one JSON line per run from standard input, forks, and writes how the child ended.

A fork starts in milliseconds where a new interpreter takes seconds; the child is a process of its own and SIGKILL is a
real one. Nothing may have started threads before the fork, hence one thread for torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_tensors import adapters, optimizer_states, selected

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation
from fellrec.experiment.run_dir import write_evaluation
from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.records import Job
from fellrec.report.export import write_users
from fellrec.state.files import write_json
from fellrec.types import Evaluation


class History(FederatedCallback):
    """Every validation's figures; a part of the checkpoint."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        if evaluation.stage == "val":
            self.figures[str(evaluation.round_index)] = dict(evaluation.summary)

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.figures = state["figures"]


class Started(FederatedCallback):
    """The clients that were trained by this process."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_client_start(self, job: Job) -> None:
        self.rows.append(job.row)


def kill_at(counted: Callable[[str], str | None], number: int) -> Callable[[str], None]:
    """A function that kills this process at the ``number``-th call that counts."""
    calls = 0

    def count(name: str) -> None:
        nonlocal calls
        if counted(name):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return count


def arm(at: str, number: int) -> None:
    """Kill at the ``number``-th call of a hook, or with ``write`` before a file gets its name or is flushed."""
    if at == "write":
        before, fsync, replace = kill_at(lambda name: name, number), os.fsync, os.replace
        os.fsync = lambda handle: (before("write"), fsync(handle))[1]  # type: ignore[assignment]
        os.replace = lambda *paths: (before("write"), replace(*paths))[1]  # type: ignore[assignment]
        return
    before, call = kill_at(lambda name: name if name == at else None, number), Events.call

    def counting(self: Events, hook: str, *records: object) -> None:
        # A hook that ends something counts when its callbacks were called, but for the last one: the checkpoint.
        last = self.callbacks.pop() if hook == at == "on_round_end" else None
        call(self, hook, *records)
        before(hook)
        if last is not None:
            self.callbacks.append(last)
            getattr(last, hook)(*records)

    Events.call = counting  # type: ignore[method-assign]


def run(recommender: Recommender, overrides: list[str], order: dict[str, Any]) -> None:
    """Run or resume what ``order`` names, and write its results."""
    run_dir = Path(order["run_dir"])
    run_dir.mkdir(exist_ok=True)
    federation = build_federation(compose([*overrides, *order.get("overrides", [])]), recommender)
    history, started = History(), Started()
    parts = {**federation.persisted, "history": history}
    checkpoint = Checkpoint(run_dir, parts, federation.population, order.get("every", 1))
    if order.get("resume"):
        checkpoint.resume()
    loop = federation.loop([history, started, checkpoint])
    if order.get("at"):
        arm(order["at"], order["number"])
    evaluation = loop.run().evaluation
    write_evaluation(run_dir, evaluation, {})
    write_users(run_dir, evaluation, recommender.data, recommender.cold)
    tensors = {"adapters": adapters(loop), "selected": selected(loop), "optimizers": optimizer_states(loop)}
    torch.save(tensors, run_dir / "tensors.pt")
    selection = {name: value for name, value in loop.selection.state_dict().items() if "served" not in name}
    state = {
        "progress": loop.progress.state_dict(),
        "local_steps": loop.population.local_steps,
        "selection": selection,
        "history": history.figures,
        "ledger": loop.exchange.ledger.rows(),
    }
    write_json(run_dir / "state.json", state)
    write_json(run_dir / "trained.json", started.rows)


def main() -> None:
    """One child after the other."""
    torch.set_num_threads(1)
    overrides: list[str] = json.loads(sys.stdin.readline())
    config = compose(overrides)
    recommender = build_recommender(config, build_data(config))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(recommender, overrides, json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
