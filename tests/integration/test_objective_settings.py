"""Settings of the local objectives, and a rule that needs every start: stopped and resumed, or cut, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import pytest
import torch
from run_tensors import all_tensors
from torch import Tensor

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import Federation, build_federation
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import Job, Trained
from fellrec.types import Evaluation

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

    def on_client_end(self, trained: Trained) -> None:
        self.losses[trained.job.round_index, trained.row] = trained.loss

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        self.figures.append(dict(evaluation.summary))

    def of(self, loop: FederatedLoop) -> Result:
        """Run to the end."""
        loop.run()
        self.tensors = all_tensors(loop)
        return self


class Stopped(Exception):
    """Instead of a signal."""


class StopsInTheSecondRound(FederatedCallback):
    """After the second step of the second client: between two encodings of the items, and two checkpoints."""

    def __init__(self) -> None:
        self.steps = self.round_index = 0

    def on_client_start(self, job: Job) -> None:
        self.round_index = job.round_index

    def on_step_end(self, loss: float) -> None:
        self.steps += self.round_index == 1
        if self.steps == 5:
            raise Stopped


def new_federation(overrides: list[str]) -> Federation:
    config = compose(overrides)
    return build_federation(config, build_recommender(config, build_data(config)))


@pytest.fixture(scope="module")
def given(tiny_overrides: list[str]) -> Callable[[str], list[str]]:
    return lambda case: [*tiny_overrides, *SHORT.split(), "backbone.num_layers=4", *SETTINGS[case].split()]


@pytest.fixture(scope="module")
def whole(given: Callable[[str], list[str]]) -> Callable[[str], Result]:
    """The run in one go with the whole model."""

    @once
    def run(case: str) -> Result:
        result = Result({}, [], {})
        return result.of(new_federation(given(case)).loop((result,)))

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
    first = new_federation(given(case))
    checkpoint = Checkpoint(tmp_path, first.persisted, first.population)
    with pytest.raises(Stopped):
        first.loop((checkpoint, StopsInTheSecondRound())).run()
    second, resumed = new_federation(given(case)), Result({}, [], {})
    checkpoint = Checkpoint(tmp_path, second.persisted, second.population)
    assert checkpoint.resume() == second.progress.round_index == 1
    resumed.of(second.loop((resumed, checkpoint)))
    assert [client for _, client in resumed.losses] == [1, 2], "the first had finished"
    assert len(resumed.figures) == 2
    assert_same(resumed, whole(case))


@pytest.mark.parametrize("case", [case for case in SETTINGS if case not in KEPT])
def test_through_the_cut_it_has_the_same_bits(
    case: str, given: Callable[[str], list[str]], whole: Callable[[str], Result]
) -> None:
    cut = Result({}, [], {})
    cut.of(new_federation([*given(case), "split.transport=inprocess"]).loop((cut,)))
    assert len(cut.losses) == 6
    assert_same(cut, whole(case))
