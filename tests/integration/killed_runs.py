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

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.experiment import Recommender, build_data, build_loop, build_recommender
from fellrec.experiment.run_dir import write_evaluation, write_json
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.report.export import write_users
from fellrec.types import Evaluation


class History(FederatedCallback):
    """Every validation's figures; kept in the state's extras, as a logger's run id is."""

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        if evaluation.stage == "val":
            history = loop.state.extras.setdefault("history", {})
            history[str(evaluation.round_index)] = dict(evaluation.summary)


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
    """Kill at the ``number``-th call of a hook, or with ``write`` at the ``number``-th flush of a file or folder."""
    if at == "write":
        before, fsync = kill_at(lambda name: name, number), os.fsync
        os.fsync = lambda handle: (before("write"), fsync(handle))[1]  # type: ignore[assignment]
        return
    before, call = kill_at(lambda name: name if name == at else None, number), FederatedLoop.call

    def counting(self: FederatedLoop, hook: str, *arguments: object) -> None:
        # A hook that ends something counts when its callbacks were called, but for the last one: the checkpoint.
        last = self.callbacks.pop() if hook == at == "on_round_end" else None
        call(self, hook, *arguments)
        before(hook)
        if last is not None:
            self.callbacks.append(last)
            getattr(last, hook)(self, *arguments)

    FederatedLoop.call = counting  # type: ignore[method-assign]


def run(recommender: Recommender, overrides: list[str], order: dict[str, Any]) -> None:
    """Run, or go on with, what ``order`` says, and write what it came to."""
    run_dir = Path(order["run_dir"])
    run_dir.mkdir(exist_ok=True)
    checkpoint = Checkpoint(run_dir, order.get("every", 1))
    loop = build_loop(compose([*overrides, *order.get("overrides", [])]), recommender, [History()])
    if order.get("resume"):
        checkpoint.resume(loop)
    loop.callbacks.append(checkpoint)
    if order.get("at"):
        arm(order["at"], order["number"])
    trained: list[int] = []
    train = loop.trainer.train
    loop.trainer.train = lambda client, *rest: (trained.append(client), train(client, *rest))[1]  # type: ignore
    evaluation = loop.run()
    write_evaluation(run_dir, evaluation, {})
    write_users(run_dir, evaluation, recommender.data, recommender.cold)
    banks = {name: loop.state.bank_named(name).tensors for name in ("current", "best", "best_per_client")}
    moments = {client: loop.state.optimizer_of(client) for client in sorted(loop.state.optimizers)}
    rest = {name: getattr(loop.state, name) for name in ("round_index", "local_steps", "rounds_without_gain", "extras")}
    torch.save({"banks": banks, "moments": moments}, run_dir / "tensors.pt")
    selection = {name: value for name, value in vars(loop.state.selection).items() if "bank" not in name}
    ledger = loop.execution.ledger.rows()
    write_json(run_dir / "state.json", {**rest, "selection": selection, "ledger": ledger})
    write_json(run_dir / "trained.json", trained)


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
