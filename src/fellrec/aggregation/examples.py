"""What laws compare: results of rounds, models, states; and how an example that breaks a law is described."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.toy import ToyFederation, ToyRound
from fellrec.federated.records import SumsOnly, Updates
from fellrec.functional.stacks import LazyStack
from fellrec.state.tensor_store import StoredTensors

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""Tolerances of figures that are computed in another order."""
_METRIC_NAME = re.compile(r"[\w./: -]+")


class LawBrokenError(Exception):
    """A law does not hold; the message is the smallest example that was found."""


class NotApplicableError(Exception):
    """A law says nothing about a rule; the message is what the rule declares."""


@contextmanager
def example(num_clients: int, round_index: int, seed: int, more: str = "") -> Iterator[None]:
    """Name the example in whatever is raised; other errors than ours break the law."""
    where = f"{num_clients} client{'s' * (num_clients != 1)}, round {round_index}, seed {seed}"
    where = f"{where}, {more}" if more else where
    try:
        yield
    except LawBrokenError as error:
        raise LawBrokenError(f"{where}: {error}") from error
    except Exception as error:
        raise LawBrokenError(f"{where}: {type(error).__name__}: {error}{_place(error)}") from error


def _place(error: Exception) -> str:
    """The last line of code outside this package and other libraries, in brackets; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not ({"fellrec", "site-packages"} & set(Path(frame.filename).parts))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def check_round(found: ToyRound, federation: ToyFederation) -> None:
    """Refuse a result with a wrong shape or type, or a figure that is not finite."""
    updates, aggregated = found.updates, found.aggregated
    size, kinds = len(updates.clients), federation.initial
    numbers = numbers_of(updates)
    for name, value in dict(aggregated.adapters).items():
        if name not in kinds:
            raise LawBrokenError(f"{name} is returned, which is not a parameter of the adapter")
        if tuple(value.shape) != (size, *kinds[name].shape):
            raise LawBrokenError(f"{name} is {list(value.shape)}, needed is {[size, *kinds[name].shape]}")
        if value.dtype != kinds[name].dtype:
            raise LawBrokenError(f"{name} is {value.dtype}, needed is {kinds[name].dtype}")
        if not bool(value.isfinite().all()):
            raise LawBrokenError(f"{name} is not finite: {text_of(value)}; {numbers}")
    figures = [(name, value, (size, size)) for name, value in aggregated.matrices.items()]
    for name, value, shape in [*figures, *((n, v, (size,)) for n, v in aggregated.per_client.items())]:
        if tuple(value.shape) != shape:
            raise LawBrokenError(f"{name} is {list(value.shape)}, needed is {list(shape)}")
        if not bool(value.isfinite().all()):
            raise LawBrokenError(f"{name} is not finite: {text_of(value)}; {numbers}")
    for name, figure in aggregated.metrics.items():
        if not _METRIC_NAME.fullmatch(name) or not math.isfinite(figure):
            raise LawBrokenError(f"the metric {name!r} is {figure}: needed is a finite number with a name for MLflow")


def check_same_figures(expected: ToyRound, found: ToyRound, places: Sequence[int]) -> None:
    """Refuse matrices and vectors that did not move with the clients; client n of ``found`` is ``places[n]``."""
    for name, matrix in expected.aggregated.matrices.items():
        wanted = {name: matrix[places][:, places]}
        check_close(wanted, {name: found.aggregated.matrices[name]}, "", numbers_of(expected.updates))
    for name, vector in expected.aggregated.per_client.items():
        check_close({name: vector[places]}, {name: found.aggregated.per_client[name]}, "", numbers_of(expected.updates))


def check_same_models(plain: ToyFederation, other: ToyFederation, rows: Mapping[int, int], updates: Updates) -> None:
    """Refuse models that differ; row n of ``other`` is ``rows[n]`` of ``plain``."""
    for row, place in rows.items():
        check_close(plain.model(place), other.model(row), f"client {place % len(plain.clients)}", numbers_of(updates))


def check_close(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, numbers: str) -> None:
    """Refuse figures that differ by more than rounding, naming the one that differs most."""
    for name, value in expected.items():
        if name not in found:
            continue  # a parameter that is not returned stays as it was trained
        wanted, got = value.double(), found[name].double()
        excess = (got - wanted).abs() - ABSOLUTE - RELATIVE * wanted.abs()
        if not bool((excess <= 0).all()):
            place = int(excess.nan_to_num(torch.inf).argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), wanted.shape)]
            figures = f"{float(got.reshape(-1)[place]):.6g}, expected {float(wanted.reshape(-1)[place]):.6g}"
            raise LawBrokenError(f"{where}{where and ', '}{name}{index}: {figures}; {numbers}")


def check_same_bits(expected: Any, found: Any, what: str = "", where: str = "") -> None:
    """Refuse states that differ."""
    what = what or "another"
    if isinstance(expected, StoredTensors) and isinstance(found, StoredTensors):
        return check_same_bits(expected.tensors(), found.tensors(), what, where)
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected.keys() == found.keys():
        for key in expected:
            check_same_bits(expected[key], found[key], what, f"{where}/{key}" if where else str(key))
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        for place, item in enumerate(expected):
            check_same_bits(item, found[place], what, f"{where}/{place}")
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if not torch.equal(expected, found):
            raise LawBrokenError(f"{what} {where}: {text_of(found)}, expected {text_of(expected)}")
    elif not (type(expected) is type(found) and (expected == found or _is_nan(expected))):
        raise LawBrokenError(f"{what} {where}: {found!r}, expected {expected!r}")
    return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def dense(value: Any) -> Any:
    """The same with tensors in memory instead of stacks that are read."""
    if isinstance(value, Updates):
        return replace(value, **{field.name: dense(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, SumsOnly):
        return SumsOnly(dict(value.hidden), value.rule)
    if isinstance(value, LazyStack):
        return dict(value)
    return {name: dense(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def tensors_in(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in updates, by what they are."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Updates):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), field.name)
    elif isinstance(value, SumsOnly):
        yield from ((f"{where} {name}", value.hidden.block(name, slice(None))) for name in value.hidden)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from tensors_in(item, f"{where} {name}")


def check_unchanged(before: Mapping[str, Tensor], updates: Updates, how: str) -> None:
    """Refuse updates of which a tensor is not what it was."""
    for where, value in tensors_in(updates):
        if not torch.equal(value, before[where]):
            raise LawBrokenError(f"updates.{where} {how}: {text_of(value)}, was {text_of(before[where])}")


def numbers_of(updates: Updates) -> str:
    """Losses and samples, for messages."""
    return f"losses {text_of(updates.losses)}, samples {text_of(updates.num_samples)}"


def text_of(values: Tensor) -> str:
    """The first values of a tensor, for messages."""
    shown = [f"{value:.4g}" for value in values.double().reshape(-1)[:6].tolist()]
    return f"[{', '.join([*shown, *['…'] * (values.numel() > len(shown))])}]"
