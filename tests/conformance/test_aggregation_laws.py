"""Properties that every rule in ``conf/aggregation`` and every variant of FELLRec must have.

``fidelity=released_code`` is not among them: that it breaks the permutation law is tested in unit/aggregation.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fellrec.aggregation import AggregationCallback, UpdateMixing
from fellrec.config.compose import compose
from fellrec.config.instantiate import instantiate
from fellrec.config.paths import group_choices
from fellrec.federated.populations import SharedAndPersonal, SharedModel
from fellrec.federated.records import Updates

VARIANTS = [
    {"_target_": "fellrec.aggregation.FELLRec", "similarity": "parameters"},
    {"_target_": "fellrec.aggregation.FELLRec", "attention": False},
    {"_target_": "fellrec.aggregation.FELLRec", "heating": False},
    {"_target_": "fellrec.aggregation.FELLRec", "alpha": 3.0, "beta": 1.0, "temperature": 0.001},
    {"_target_": "fellrec.aggregation.UpdateMixing", "attention": False, "own_share": 0.0},
    {"_target_": "fellrec.aggregation.Krum", "before": ["nnm"]},
    {"_target_": "fellrec.aggregation.CoordinateMedian", "before": ["arc", "bucketing", "nnm"]},
]
RULES = [pytest.param(compose([f"aggregation={name}"]).aggregation, id=name) for name in group_choices()["aggregation"]]
RULES += [pytest.param(cfg, id="-".join(map(str, list(cfg.values())[1:]))) for cfg in VARIANTS]


def has_matrix(cfg) -> bool:
    """Whether a rule gives each client a mixture."""
    return type(rule_of(cfg)).mixing_matrix is not AggregationCallback.mixing_matrix


def rule_of(cfg):
    """A new rule that has begun."""
    rule = instantiate(cfg, "aggregation")
    rule.part_of = {"a": "body", "b": "tail"}.__getitem__
    rule.begin({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    return rule


def has_one_model(rule):
    """Whether what is aggregated starts from one model of the server."""
    return issubclass(rule.population, SharedModel | SharedAndPersonal)


def suited(rule, updates, round_index):
    """The updates as the rule gets them in a run.

    For rules with one model: from the first client's start. Only parameters that are exchanged, and tensors of the
    clients that the rule asks for.
    """
    start, end = updates.start, updates.end
    tensors = {name: {key: p - 0.5 for key, p in end.items()} for name in rule.client_tensors}
    before = {name: {key: torch.zeros_like(p) for key, p in end.items()} for name in rule.client_tensors}
    if has_one_model(rule):
        start = {name: p[:1].expand_as(p).clone() for name, p in start.items()}
        end = {name: start[name] + p - updates.start[name] for name, p in end.items()}
    start, end = ({n: p for n, p in stack.items() if rule.exchanges(n, round_index)} for stack in (start, end))
    return dataclasses.replace(updates, start=start, end=end, tensors=tensors, start_tensors=before)


every_rule = pytest.mark.parametrize("cfg", RULES)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def rounds(draw, cfg):
    """Updates of 1 to 6 clients, or as many as the rule needs, some of which may be zero, and a round."""
    least = rule_of(cfg).limits.least_clients
    num_clients, seed = draw(st.integers(least, max(6, least + 2))), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    start = {
        "a": torch.randn(num_clients, 2, 3, generator=generator),
        "b": torch.randn(num_clients, 4, generator=generator),
    }
    moved = torch.tensor(draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients)))
    end = {
        name: p + torch.randn(p.shape, generator=generator) * moved.reshape(-1, *[1] * (p.ndim - 1))
        for name, p in start.items()
    }
    losses = draw(st.lists(st.floats(0, 20), min_size=num_clients, max_size=num_clients))
    samples = draw(st.lists(st.integers(1, 1000), min_size=num_clients, max_size=num_clients))
    steps = draw(st.lists(st.integers(1, 50), min_size=num_clients, max_size=num_clients))
    received = draw(st.lists(st.floats(0, 20), min_size=num_clients, max_size=num_clients))
    numbers = {
        "num_steps": torch.tensor(steps).double(),
        "num_clients": num_clients,
        "start_losses": torch.tensor(received).double(),
    }
    measured = torch.tensor(losses).double(), torch.tensor(samples).double()
    updates = Updates(tuple(range(num_clients)), start, end, *measured, **numbers)
    return updates, draw(st.integers(0, 100))


@pytest.mark.parametrize("cfg", [cfg for cfg in RULES if has_matrix(cfg.values[0])])
@quick
@given(st.data())
def test_rows_sum_to_one_and_no_weight_is_negative(cfg, data):
    matrix = rule_of(cfg).mixing_matrix(*data.draw(rounds(cfg)))
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    assert (matrix >= 0).all()


@every_rule
@quick
@given(st.data(), st.randoms(use_true_random=False))
def test_permuting_clients_permutes_the_result(cfg, data, random):
    rule, (updates, round_index) = rule_of(cfg), data.draw(rounds(cfg))
    updates = suited(rule, updates, round_index)
    order = list(range(len(updates.clients)))
    random.shuffle(order)
    permuted = dataclasses.replace(
        updates,
        clients=tuple(updates.clients[n] for n in order),
        start={name: p[order] for name, p in updates.start.items()},
        end={name: p[order] for name, p in updates.end.items()},
        losses=updates.losses[order],
        num_samples=updates.num_samples[order],
        num_steps=updates.num_steps[order],
        start_losses=updates.start_losses[order],
        tensors={name: {key: p[order] for key, p in stack.items()} for name, stack in updates.tensors.items()},
    )
    expected = rule.aggregate(updates, round_index)
    result = rule_of(cfg).aggregate(permuted, round_index)
    for name, parameter in expected.adapters.items():
        torch.testing.assert_close(result.adapters[name], parameter[order], rtol=1e-5, atol=1e-6)
    for name, stack in expected.tensors.items():
        for key, tensor in stack.items():
            torch.testing.assert_close(result.tensors[name][key], tensor[order], rtol=1e-5, atol=1e-6)
    for name, matrix in expected.matrices.items():
        torch.testing.assert_close(result.matrices[name], matrix[order][:, order], rtol=1e-7, atol=1e-9)
    for name, vector in expected.per_client.items():
        torch.testing.assert_close(result.per_client[name], vector[order], rtol=1e-7, atol=1e-9)


@every_rule
@quick
@given(st.data())
def test_equal_inputs_are_a_fixed_point(cfg, data):
    """Rules that mix adapters do not use the starts here, so these may differ; a rule that mixes updates does.

    A rule that moves one model by something else than the updates' mean keeps it where no client moves.
    """
    updates, round_index = data.draw(rounds(cfg))
    rule = rule_of(cfg)
    same = {name: p[:1].expand_as(p).clone() for name, p in updates.end.items()}
    start = updates.start
    if isinstance(rule, UpdateMixing):
        start = {name: p[:1].expand_as(p).clone() for name, p in start.items()}
    if has_one_model(rule):
        start = same
    equal = suited(rule, dataclasses.replace(updates, start=start, end=same), round_index)
    for name, parameter in rule.aggregate(equal, round_index).adapters.items():
        torch.testing.assert_close(parameter, same[name], rtol=0, atol=0)


@every_rule
@quick
@given(st.data())
def test_inputs_are_not_changed_and_not_aliased(cfg, data):
    """A rule that sees nothing returns no adapters, nor one whose clients keep what they trained."""
    rule, (updates, round_index) = rule_of(cfg), data.draw(rounds(cfg))
    updates = suited(rule, updates, round_index)
    tensors = [*updates.start.values(), *updates.end.values(), updates.losses, updates.num_samples]
    tensors += [updates.start_losses, updates.num_steps]
    before = [tensor.clone() for tensor in tensors]
    result = rule.aggregate(updates, round_index)
    for parameter in result.adapters.values():
        parameter.fill_(np.pi)
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0)
    returns_none = rule.sees == "nothing" or rule.keeps_trained
    assert list(result.adapters) == ([] if returns_none else list(updates.end))
