"""Every choice of ``conf/aggregation``, and variants of some, keep the laws of ``fellrec check-rule``.

``fidelity=released_code`` of FELLRec is not among them: tests/unit/aggregation/test_conformance.py shows that the laws
find its dependence on the order of clients.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest

import fellrec.aggregation
from fellrec.aggregation import AggregationCallback, CoordinateMedian, FELLRec, HetLoRA, Krum, UpdateMixing
from fellrec.aggregation.conformance import check_rule
from fellrec.aggregation.settings import RULES

VARIANTS: list[tuple[type[AggregationCallback], dict[str, Any]]] = [
    (FELLRec, {"similarity": "parameters"}),
    (FELLRec, {"attention": False}),
    (FELLRec, {"heating": False}),
    (FELLRec, {"alpha": 3.0, "beta": 1.0, "temperature": 0.001}),
    (UpdateMixing, {"attention": False, "own_share": 0.0}),
    (UpdateMixing, {"server_learning_rate": 0.5}),
    (Krum, {"before": ("nnm",)}),
    (CoordinateMedian, {"before": ("arc", "bucketing", "nnm")}),
    (HetLoRA, {"prune_to": 0.5, "prune_strength": 0.1}),
]
CHECKED = [pytest.param(getattr(fellrec.aggregation, name), {}, id=kind.about.name) for name, kind in RULES.items()]
CHECKED += [
    pytest.param(rule, given, id="-".join([rule.__name__, *(f"{k}={v}" for k, v in given.items())]))
    for rule, given in VARIANTS
]


@pytest.mark.parametrize(("rule", "given"), CHECKED)
def test_no_law_is_broken(rule: type[AggregationCallback], given: dict[str, Any]) -> None:
    results = check_rule(partial(rule, **given), seeds=(0,))
    broken = [f"{result.law}: {result.text}: {result.reason}" for result in results if result.outcome == "failed"]
    assert not broken
    assert all(inspect.cleandoc(result.reason) for result in results if result.outcome != "passed")
