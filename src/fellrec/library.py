"""The commands as functions, for notebooks and programs: ``fellrec.run``, ``fellrec.compare``, ``fellrec.plot``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from fellrec.config.compose import compose
from fellrec.errors import ConfigError, unknown
from fellrec.experiment.run import build, check_alone
from fellrec.federated.callback import FederatedCallback
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.page import save_figure
from fellrec.report.styles import drawing, metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("svg", "pdf", "png")


def run(overrides: Sequence[str] | DictConfig = (), callbacks: Sequence[FederatedCallback] = ()) -> RuleResult:
    """Train and test one run in this process, as ``fellrec train``.

    Args:
        overrides: As on the command line, such as ``["aggregation=fedavg", "trainer.num_rounds=3"]``; or a composed
            configuration.
        callbacks: Called after those of the configuration.

    Returns:
        The result; its metrics are in ``result.evaluation.summary``, such as ``"ndcg_at_10/mean"``.

    Raises:
        ConfigError: If a setting is not allowed, or needs several processes.
        DataError: If the data cannot be used.
    """
    config = overrides if isinstance(overrides, DictConfig) else compose(_checked(overrides))
    return build(config, callbacks).execute()


def compare(overrides: Sequence[str] = (), runs: Sequence[str] = ()) -> Comparison:
    """Train and test several rules and seeds on one partition in this process, as ``fellrec compare``.

    Args:
        overrides: As on the command line, with comma-separated values, such as ``["aggregation=fedavg,fellrec",
            "seed=0,1"]``.
        runs: Further overrides of single rules, as ``--run``.

    Returns:
        The results with the statistics of their differences; the files are in its ``run_dir``.

    Raises:
        ConfigError: If a setting is not allowed, needs several processes, or cannot be compared.
        DataError: If the data cannot be used.
    """
    from fellrec.cli.compare import compare as run_all
    from fellrec.experiment.variants import check_comparable, configurations

    configs = configurations(_checked(overrides), runs)
    check_comparable(configs)
    check_alone(configs[0])
    comparison, run_dir = run_all(configs)
    return replace(comparison, run_dir=run_dir)


def _checked(overrides: Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of texts, such as [{overrides!r}], not one text")
    return list(overrides)


@dataclass(frozen=True)
class Plot:
    """A figure that notebooks show.

    Attributes:
        figure: Of matplotlib.
    """

    figure: Figure

    def save(self, path: str | Path) -> None:
        """Write the figure as SVG, PDF or PNG, according to the name.

        Raises:
            ConfigError: If the name ends with something else.
        """
        form = Path(path).suffix.removeprefix(".")
        if form not in _FORMATS:
            raise ConfigError(f"{path}: {unknown('format', form, _FORMATS)}")
        Path(path).write_bytes(self._drawn(form))

    def _repr_svg_(self) -> str:
        return self._drawn("svg").decode()

    def _drawn(self, form: str) -> bytes:
        with drawing():
            return save_figure(self.figure, form)


def plot(comparison: Comparison, figure: str = "clients", metric: str = "ndcg_at_10") -> Plot:
    """A figure of a comparison, as in its report.

    Args:
        comparison: With at least one learned rule, for ``"clients"`` two.
        figure: ``"clients"``, each client under two rules; ``"spread"``, mean against spread; ``"cost"``.
        metric: Such as ``ndcg_at_10``.

    Raises:
        ConfigError: If the figure or the metric is unknown, or the comparison has too little for it.
    """
    from fellrec.report.figures import costs, slopes
    from fellrec.report.plots import frontier
    from fellrec.report.sections import spread_points

    known = comparison.results[0].evaluation.per_client
    if metric not in known:
        raise ConfigError(unknown("metric", metric, known))
    makers = {
        "clients": lambda: slopes(comparison, metric) if len(comparison.rules("learned")) > 1 else None,
        "spread": lambda: frontier(spread_points(comparison, metric), metric_title(metric)),
        "cost": lambda: costs(comparison),
    }
    if figure not in makers:
        raise ConfigError(unknown("figure", figure, makers))
    with drawing():
        drawn = makers[figure]()
    if drawn is None:
        raise ConfigError(
            f"the comparison has too little for the figure {figure!r}: two rules, or runs with their costs"
        )
    return Plot(drawn)
