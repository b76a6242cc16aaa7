import pytest
import torch

from fellrec.aggregation import Centralized, FedAvg, Local, Uniform
from fellrec.errors import TrainingError
from fellrec.federated.records import Updates


def test_local_and_centralized_leave_adapters_as_they_are(make_updates):
    updates = make_updates()
    for rule in (Local(), Centralized()):
        for name, parameter in rule.aggregate(updates, 3).adapters.items():
            torch.testing.assert_close(parameter, updates.end[name], rtol=0, atol=0)
    assert Centralized.pools_clients
    assert not Local.pools_clients


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
