import pytest
import torch

from fellrec.aggregation import AggregationCallback
from fellrec.errors import TrainingError
from fellrec.federated.records import Aggregated


class Given(AggregationCallback):
    def __init__(self, matrix):
        self.matrix = matrix

    def mixing_matrix(self, updates, round_index):
        return self.matrix


def test_default_aggregate_mixes_and_records_the_matrix(make_updates):
    updates = make_updates(2)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    result = Given(swap).aggregate(updates, 0)
    torch.testing.assert_close(result.matrices["mixing"], swap)
    for name, parameter in updates.end.items():
        torch.testing.assert_close(result.adapters[name], parameter.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        (torch.eye(3), r"shape \(3, 3\); needed is \(2, 2\)"),
        (torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]), "not finite"),
        (torch.tensor([[1.0, 0.0], [0.5, 0.51]]), "row 1 that sums to 1.01"),
        (None, "mixing_matrix returned NoneType; needed is a tensor"),
        ([[1.0, 0.0], [0.0, 1.0]], "mixing_matrix returned list; needed is a tensor"),
        ({"": [[1.0, 0.0], [0.0, 1.0]]}, "the mixing matrix is of type list; needed is a tensor"),
    ],
)
def test_a_wrong_matrix_is_refused_in_the_name_of_the_rule(make_updates, matrix, problem):
    with pytest.raises(TrainingError, match=f"aggregation given: .*{problem}"):
        Given(matrix).aggregate(make_updates(2), 0)


def test_a_rule_that_defines_nothing_is_refused():
    with pytest.raises(TypeError, match=r"Empty: .*mixing_matrix, update_weights or aggregate"):
        type("Empty", (AggregationCallback,), {})


def test_a_rule_may_override_aggregate_alone(make_updates):
    class Zero(AggregationCallback):
        def aggregate(self, updates, round_index):
            return Aggregated({name: torch.zeros_like(p) for name, p in updates.end.items()})

    updates = make_updates()
    assert not Zero().aggregate(updates, 0).adapters["a"].any()
    with pytest.raises(NotImplementedError, match="zero"):
        Zero().mixing_matrix(updates, 0)
    assert Zero().state_dict() == {}
