"""The rows of the table: what each compares, how it is measured, and which ratio is aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import commands
from bench.environments import ROOT, environment_of

TOLERANCE = 1e-5
"""Largest relative difference of losses that are equal up to the order of float32 sums."""
FAST_TOLERANCE = 1e-2
"""The same with settings that round more."""


@dataclass(frozen=True)
class How:
    """How rows are measured.

    Attributes:
        work: Folder for environments, workloads and runs.
        repeats: How often.
        overrides: The user's, for rows that train.
        data: Folder that holds ``ml-1m``, for the row that needs it.
    """

    work: Path
    repeats: int = 3
    overrides: Sequence[str] = ()
    data: Path = ROOT.parent / "shared" / "data"


@dataclass
class Result:
    """A line of the table.

    Attributes:
        row: Name of the row.
        what: What is compared.
        target: Largest value that is aimed at; smallest, with ``is_share``.
        ours: Wall seconds of ours, by repeat.
        rival: Wall seconds of the rival, by repeat; empty if seconds are the value.
        ours_cpu: CPU seconds of ours.
        rival_cpu: CPU seconds of the rival.
        difference: Largest relative difference of losses; ``None`` if there are none to compare.
        tolerance: Of the difference.
        note: What the reader must know.
        is_share: Whether larger values are better.
    """

    row: str
    what: str
    target: float
    ours: list[float] = field(default_factory=list)
    rival: list[float] = field(default_factory=list)
    ours_cpu: list[float] = field(default_factory=list)
    rival_cpu: list[float] = field(default_factory=list)
    difference: float | None = None
    tolerance: float = TOLERANCE
    note: str = ""
    is_share: bool = False

    @property
    def is_void(self) -> bool:
        """Whether losses disagree: the seconds then say nothing."""
        return self.difference is not None and not self.difference <= self.tolerance

    @property
    def values(self) -> list[float]:
        """Ratio of our seconds to the rival's for each repeat; our seconds if there is no rival."""
        return _ratios(self.ours, self.rival) if self.rival else self.ours

    @property
    def cpu_values(self) -> list[float]:
        """The same for CPU seconds."""
        return _ratios(self.ours_cpu, self.rival_cpu) if self.rival_cpu else self.ours_cpu

    @property
    def value(self) -> float | None:
        """Median of the values; ``None`` if nothing was measured or losses disagree."""
        return None if self.is_void or not self.values else statistics.median(self.values)

    @property
    def is_reached(self) -> bool | None:
        """Whether the median is as good as the target."""
        if self.value is None:
            return None
        return self.value >= self.target if self.is_share else self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        cpu = statistics.median(self.cpu_values) if self.cpu_values else None
        found = {"value": self.value, "cpu_value": cpu, "is_void": self.is_void, "is_reached": self.is_reached}
        spread = {"spread": [min(self.values), max(self.values)] if self.values else None}
        return {**vars(self), **found, **spread}


def _ratios(ours: Sequence[float], rival: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(ours, rival, strict=True)]


def difference(ours: Sequence[Any], rival: Sequence[Any]) -> float:
    """Largest relative difference of nested lists of numbers; infinite if their shapes differ."""
    if len(ours) != len(rival) or not ours:
        return float("inf")
    if isinstance(ours[0], (list, tuple)):
        return max(difference(mine, theirs) for mine, theirs in zip(ours, rival, strict=True))
    return max(abs(mine - theirs) / max(abs(theirs), 1e-12) for mine, theirs in zip(ours, rival, strict=True))


def _paired(result: Result, ours: dict[str, Any], rival: dict[str, Any]) -> Result:
    result.ours, result.rival = ours["wall"], rival["wall"]
    result.ours_cpu, result.rival_cpu = ours["cpu"], rival["cpu"]
    if "losses" in ours:
        result.difference = difference(ours["losses"], rival["losses"])
    return result


def rounds(how: How, family: str, competitors: str) -> dict[str, Any]:
    """Seconds of rounds of all competitors; see ``bench.rounds``."""
    arguments = [str(how.work / "workloads"), family, competitors, *how.overrides, "--repeats", str(how.repeats)]
    found: dict[str, Any] = commands.in_process(how.work, "rounds", arguments)
    return found


def loop(how: How) -> list[Result]:
    """A round against the hand-written loop, with the same losses and with all that keeps them within a tolerance."""
    results = []
    for family, target in (("generative", 0.85), ("retrieval", 0.80)):
        found = rounds(how, family, "ours,loop,ours_fast")
        results.append(
            _paired(Result("loop", f"round, {family}, hand-written loop", target), found["ours"], found["loop"])
        )
        fast = Result("loop", f"round, {family}, everything on", 0.40, tolerance=FAST_TOLERANCE)
        fast.note = " ".join(found["ours_fast"]["settings"])
        results.append(_paired(fast, found["ours_fast"], found["loop"]))
    return results


def pooled(how: How) -> list[Result]:
    """The fit of a round on pooled rows against the Trainers of Transformers and Lightning."""
    found = rounds(how, "pooled-retrieval", "ours,hf_trainer,lightning_trainer")
    names = {"hf_trainer": "Hugging Face Trainer", "lightning_trainer": "Lightning Trainer"}
    return [
        _paired(Result("pooled", f"round of pooled rows, {text}", 1.0), found["ours"], found[name])
        for name, text in names.items()
    ]


def _command(module: str, what: str, target: float) -> Callable[[How], list[Result]]:
    def measure(how: How) -> list[Result]:
        rivals = {module: environment_of(module, how.work)}
        found = commands.compete(how.work, rivals, how.repeats, how.overrides)
        ours, rival = vars(found["ours"]), vars(found[module])
        result = _paired(Result(module.removesuffix("_job"), f"whole command, {what}", target), ours, rival)
        result.difference = max(difference(ours["losses"], rival["losses"]), difference(ours["ndcg"], rival["ndcg"]))
        result.note = rivals[module].packages
        return [result]

    return measure


def cli(how: How) -> list[Result]:
    """Seconds of commands that train nothing."""
    lines = {
        "train --show-config": (["train", "--show-config"], 0),
        "a mistyped override": (["train", "trainer.nun_rounds=3"], 1),
        "list": (["list"], 0),
    }
    results = []
    for name, (arguments, status) in lines.items():
        command = commands.fellrec(*arguments)
        found = commands.time_command(how.work, "cli", command, how.repeats, status)
        results.append(Result("cli", f"{name}, seconds", 1.0, ours=found.wall, ours_cpu=found.cpu))
    return results


def clients(how: How) -> list[Result]:
    """A round with validation, 500 clients against 5."""
    results = []
    for rule in ("fedavg", "fellrec"):
        found = commands.in_process(how.work, "clients", [f"aggregation={rule}", "--rounds", str(how.repeats + 1)])
        what = f"round and validation, {rule}, 500 clients against 5"
        results.append(_paired(Result("clients", what, 1.3), found["ours"], found["rival"]))
    return results


def aggregation(how: How) -> list[Result]:
    """Aggregation of 500 adapters against products."""
    found = commands.in_process(how.work, "aggregation", ["--repeats", str(how.repeats)])
    result = _paired(Result("aggregation", "500 adapters, float32 products", 1.5), found["ours"], found["rival"])
    result.difference, result.tolerance = found["difference"], 1e-4
    memory = [max(found[name]["taken"]) / 1e6 for name in ("ours", "rival")]
    result.note = f"memory {memory[0]:.0f} MB against {memory[1]:.0f} MB"
    return [result]


def floor(how: How) -> list[Result]:
    """Share of one large matrix product's speed that local training of ``ml_1m_small`` reaches, by the profile."""
    result = Result("floor", "ml_1m_small, share of the arithmetic floor", 0.6, is_share=True)
    if not (ROOT / "conf" / "callbacks" / "profile.yaml").is_file():
        result.note = "not measured: this version has no callbacks=profile"
    elif not (how.data / "ml-1m").is_dir():
        result.note = f"not measured: {how.data / 'ml-1m'} is absent"
    else:
        found = commands.profile(how.work, how.data / "ml-1m")
        result.ours, result.ours_cpu = found, found
        result.note = "values are the rounds'"
    return [result]


def demo(how: How) -> list[Result]:
    """Seconds of ``make demo`` after installation, without any cache."""
    found = commands.time_command(how.work, "demo", commands.fellrec("compare"), 1)
    return [Result("demo", "make demo, seconds", 45.0, ours=found.wall, ours_cpu=found.cpu)]


ROWS: dict[str, Callable[[How], list[Result]]] = {
    "loop": loop,
    "flower": _command("flower", "Flower's simulation", 0.33),
    "nvflare": _command("nvflare_job", "NVFlare's simulator", 0.25),
    "released": _command("released", "released pattern", 0.25),
    "pooled": pooled,
    "cli": cli,
    "clients": clients,
    "aggregation": aggregation,
    "floor": floor,
    "demo": demo,
}
"""How to measure each row, in the order of the table."""
