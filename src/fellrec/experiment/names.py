"""What rules and runs are called, from their configurations."""

from __future__ import annotations

from omegaconf import DictConfig

from fellrec.aggregation.settings import RULES


def rule_name(config: DictConfig) -> str:
    """The rule's name in files and tags: that of its choice, or its class's name in lower case."""
    package, _, name = str(config.aggregation["_target_"]).rpartition(".")
    return RULES[name].about.name if package == "fellrec.aggregation" and name in RULES else name.lower()


def run_name(rule: str, variant: str, seed: int) -> str:
    """A name for files, such as ``fedavg-head_layers=2-s0``, or for MLflow, such as ``FedAvg-head_layers=2-s0``."""
    return "-".join([*rule.split(), *variant.split(), f"s{seed}"])


def choice_name(node: DictConfig, suffix: str) -> str:
    """What a choice of a group is called in tags, from its class: ``kmeans`` for ``KMeansPartition``."""
    return str(node["_target_"]).rpartition(".")[2].removesuffix(suffix).lower()


def data_title(name: str) -> str:
    """A data set's name for people.

    Example:
        >>> data_title("ml_1m"), data_title("synthetic")
        ('ML-1M', 'synthetic')
    """
    return name.upper().replace("_", "-") if name.startswith("ml_") else name


def table_cutoff(config: DictConfig) -> int:
    """The cutoff that tables show: 10 if it is among the run's, else its first."""
    cutoffs = list(config.trainer.cutoffs)
    return 10 if 10 in cutoffs else int(cutoffs[0])
