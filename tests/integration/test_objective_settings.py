"""Settings of the local objectives, and a rule that needs every start: stopped and resumed, or cut, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.cut.link import InProcess
from fellrec.experiment import build_data, build_loop, build_recommender
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.executor import SplitExecution
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.state import RunState
from fellrec.types import ClientUpdate, Evaluation

SHORT = "data.max_users=40 data.max_history=3 trainer.batch_size=8 trainer.max_local_steps=3"
SETTINGS = {
    "sampled, newest first": "objective.num_negatives=20 objective.negatives=popularity objective.order=newest_first "
    "adapter=lora adapter.dropout=0.2",
    "sampled, two towers": "objective.num_negatives=20 objective.item_encoder=encoded adapter=lora adapter.dropout=0.2 "
    "trainer.accumulate_grad_batches=2 trainer.batch_size=4",
    "chunked": "objective.chunk_items=7 objective.item_encoder=encoded adapter=lora adapter.dropout=0.2",
    "kept": "objective.item_encoder=encoded objective.refresh_items=2 objective.num_negatives=20",
    "frozen": "objective.item_encoder=encoded objective.freeze_items_after=1 objective.chunk_items=7",
    "generative": "objective=generative adapter=lora adapter.dropout=0.2 trainer.cutoffs=[5,10] ranker=grounding "
    "ranker.num_beams=2 ranker.max_new_tokens=5 ranker.reweight=popularity",
    "every title, among the catalogue's": "objective=generative objective.one_target_per_row=false "
    "objective.softmax=catalogue adapter=lora adapter.dropout=0.2 ranker=constrained ranker.num_beams=5",
    "updates mixed": "aggregation=updatemixing aggregation.server_learning_rate=1.5 adapter=lora",
}
KEPT = ("kept", "frozen")
"""They need the whole model; that the cut refuses them is tested with the objective."""


@dataclass
class Result(FederatedCallback):
    """What a run came to, in the parts of the model that it has, and the losses on the way."""

    losses: dict[tuple[int, int], float]
    figures: list[dict[str, float]]
    tensors: dict[str, Tensor]

    def on_client_end(self, loop: FederatedLoop, update: ClientUpdate) -> None:
        self.losses[loop.state.round_index, update.client] = update.loss

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        self.figures.append(dict(evaluation.summary))

    def on_fit_end(self, loop: FederatedLoop) -> None:
        states = [loop.state]
        if isinstance(loop.execution, SplitExecution):
            assert isinstance(loop.execution.link.transport, InProcess)
            states.append(loop.execution.link.transport.server.state)
        self.tensors = {name: tensor for state in states for name, tensor in all_tensors(state).items()}


def all_tensors(state: RunState) -> dict[str, Tensor]:
    """The current and the selected adapters, and every client's moments."""
    found = {f"{bank} {name}": t for bank in ("current", "best") for name, t in state.bank_named(bank).tensors.items()}
    for client in state.optimizers:
        for name, values in state.optimizer_of(client).items():
            found |= {f"{client} {name} {key}": tensor for key, tensor in values.items()}
    return found


class Stopped(Exception):
    """Instead of a signal."""


class StopsInTheSecondRound(FederatedCallback):
    """After the second step of the second client: between two encodings of the items, and two checkpoints."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, loop: FederatedLoop, loss: float) -> None:
        self.steps += loop.state.round_index == 1
        if self.steps == 5:
            raise Stopped


def new_loop(overrides: list[str], callbacks: tuple[FederatedCallback, ...]) -> FederatedLoop:
    config = compose(overrides)
    return build_loop(config, build_recommender(config, build_data(config)), callbacks)


@pytest.fixture(scope="module")
def given(tiny_overrides: list[str]) -> Callable[[str], list[str]]:
    return lambda case: [*tiny_overrides, *SHORT.split(), "backbone.num_layers=4", *SETTINGS[case].split()]


@pytest.fixture(scope="module")
def whole(given: Callable[[str], list[str]]) -> Callable[[str], Result]:
    """The run in one go with the whole model."""

    @once
    def run(case: str) -> Result:
        result = Result({}, [], {})
        new_loop(given(case), (result,)).run()
        return result

    return run


def assert_same(found: Result, expected: Result) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    assert not [name for name, tensor in expected.tensors.items() if not torch.equal(found.tensors[name], tensor)]
    assert {place: expected.losses[place] for place in found.losses} == found.losses
    assert found.figures == expected.figures[-len(found.figures) :]


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    case: str, given: Callable[[str], list[str]], whole: Callable[[str], Result], tmp_path: Path
) -> None:
    """With nothing but the files: the model, what the objective keeps and its random numbers are made again."""
    with pytest.raises(Stopped):
        new_loop(given(case), (Checkpoint(tmp_path), StopsInTheSecondRound())).run()
    resumed, checkpoint = Result({}, [], {}), Checkpoint(tmp_path)
    loop = new_loop(given(case), (resumed, checkpoint))
    checkpoint.resume(loop)
    assert loop.state.round_index == 1
    loop.run()
    assert [client for _, client in resumed.losses] == [1, 2], "the first had finished"
    assert len(resumed.figures) == 2
    assert_same(resumed, whole(case))


@pytest.mark.parametrize("case", [case for case in SETTINGS if case not in KEPT])
def test_through_the_cut_it_has_the_same_bits(
    case: str, given: Callable[[str], list[str]], whole: Callable[[str], Result]
) -> None:
    cut = Result({}, [], {})
    new_loop([*given(case), "split.transport=inprocess"], (cut,)).run()
    assert len(cut.losses) == 6
    assert_same(cut, whole(case))
