import pytest
import torch

from fellrec.aggregation import Centralized, FedAvg, Local, Uniform
from fellrec.errors import TrainingError
from fellrec.federated.population import Population
from fellrec.federated.populations import OneForAll
from fellrec.federated.records import Updates


def test_local_and_centralized_leave_adapters_as_they_are(make_updates):
    """They ask for no client's adapter and return none, so every row of the population keeps what it trained."""
    for rule in (Local(), Centralized()):
        result = rule.aggregate(make_updates(), 3)
        assert not result.adapters
        assert torch.equal(result.matrices["mixing"], torch.eye(4).double())
    assert Centralized.population is OneForAll
    assert Local.population is Population


def test_fedavg_is_the_mean_over_all_samples():
    """A client with n samples counts as n clients: 1 * 0 + 3 * 4 over 4 samples is 3."""
    adapters = {"a": torch.tensor([[0.0], [4.0]])}
    updates = Updates((0, 1), adapters, adapters, torch.zeros(2), torch.tensor([1.0, 3.0]))
    assert FedAvg().aggregate(updates, 0).adapters["a"].tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize("samples", [[0.0, 0.0], [-1.0, 3.0]])
def test_fedavg_refuses_impossible_sample_counts(samples):
    adapters = {"a": torch.zeros(2, 1)}
    with pytest.raises(TrainingError, match=r"fedavg: num_samples is .* clients \[4, 7\]"):
        FedAvg().aggregate(Updates((4, 7), adapters, adapters, torch.zeros(2), torch.tensor(samples)), 0)


def test_uniform_is_the_plain_mean(make_updates):
    updates = make_updates()
    for name, parameter in Uniform().aggregate(updates, 0).adapters.items():
        expected = updates.end[name].double().mean(0, keepdim=True).expand_as(parameter).float()
        torch.testing.assert_close(parameter, expected)


def test_names_are_those_of_the_configuration():
    assert [rule().name for rule in (Local, FedAvg, Uniform, Centralized)] == [
        "local",
        "fedavg",
        "uniform",
        "centralized",
    ]
