"""What MLflow shows of a comparison as a whole: the parent run's name, tags, parameters and note."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from fellrec.callbacks.mlflow_logging import DatasetInput, shown_params
from fellrec.config.instantiate import as_dict
from fellrec.config.members import data_nodes
from fellrec.data.prepared import PreparedData
from fellrec.experiment.names import choice_name, data_title
from fellrec.experiment.run_dir import provenance
from fellrec.experiment.store import store_of
from fellrec.experiment.variants import Label
from fellrec.report.comparison import Comparison, Difference
from fellrec.report.main_table import comparison_frame
from fellrec.report.significance import p_text, significance_caption, significance_text
from fellrec.report.tables import display_name, markdown
from fellrec.tracking.links import compare_path, metric_path
from fellrec.tracking.run_log import NewRun, RunLog

_MOST_RULES = 4
"""So many are named in a title."""
_MOST_CHARACTERS = 7500
"""Of a note: MLflow's limit, less some for quoting."""
_MOST_RUNS = 20
"""So many are linked together."""
_LEVEL = 0.05


def parent_of(
    configs: Sequence[DictConfig], labels: Sequence[Label], data: PreparedData, backbone: str, name: str
) -> NewRun:
    """The parent run to create.

    Args:
        configs: Of the runs.
        labels: What each is called.
        data: The prepared data.
        backbone: What the backbone is called.
        name: Of the comparison's directory; the tag ``comparison`` of all its runs.
    """
    first = configs[0]
    tags = {
        "kind": "comparison",
        "comparison": name,
        "rule": ", ".join(dict.fromkeys(label.rule for label in labels)),
        "seed": ", ".join(str(seed) for seed in dict.fromkeys(label.seed for label in labels)),
        **common_tags(first, data, backbone),
        **provenance().to_dict(),
    }
    return NewRun(store_of(first), first.tracking.experiment, parent_title(labels, data.name), tags)


def common_tags(config: DictConfig, data: PreparedData, backbone: str) -> dict[str, str]:
    """Tags to filter runs by that all runs of a comparison share."""
    return {
        "data": data.name,
        "backbone": backbone,
        "objective": choice_name(config.objective, "Objective"),
        "partition": choice_name(config.partition, "Partition"),
        "clients": str(data.num_clients),
    }


def parent_title(labels: Sequence[Label], data: str) -> str:
    """The name of a comparison in MLflow.

    Example:
        >>> runs = [Label(rule, "", seed) for rule in ("fedavg", "fellrec") for seed in range(3)]
        >>> parent_title(runs, "ml_1m"), parent_title(runs[:1], "plays")
        ('FedAvg vs FELLRec · ML-1M · 3 seeds', 'FedAvg · plays · seed 0')
    """
    rules = list(dict.fromkeys(display_name(" ".join(filter(None, (label.rule, label.variant)))) for label in labels))
    seeds = list(dict.fromkeys(label.seed for label in labels))
    compared = " vs ".join(rules) if len(rules) <= _MOST_RULES else f"{len(rules)} rules"
    return f"{compared} · {data_title(data)} · {f'seed {seeds[0]}' if len(seeds) == 1 else f'{len(seeds)} seeds'}"


def log_settings(log: RunLog, configs: Sequence[DictConfig], labels: Sequence[Label], dataset: DatasetInput) -> None:
    """Log the data set, the settings that all runs share, and the rules and seeds that are compared."""
    every = [shown_params(as_dict(config)) for config in configs]
    shared = {key: value for key, value in every[0].items() if all(one.get(key) == value for one in every)}
    compared = {
        "rules": ", ".join(dict.fromkeys(display_name(label.rule) for label in labels)),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(label.seed for label in labels)),
        "num_runs": len(labels),
    }
    log.log_params({**shared, **compared})
    log.log_dataset(dataset.name, dataset.key, dataset.source, dataset.statistics)


def log_result(log: RunLog, comparison: Comparison, cutoff: int, command: Sequence[str]) -> None:
    """Log the files of a comparison and its note, which the parent run's page shows first.

    Args:
        log: Of the parent run; its directory has ``comparison/``.
        comparison: The results.
        cutoff: K of the tables.
        command: The words of the command; empty if they are not known.
    """
    log.log_artifact(log.run_dir / "comparison")
    log.set_tag("mlflow.note.content", note(comparison, cutoff, command, log.place))


def note(comparison: Comparison, cutoff: int, command: Sequence[str], place: tuple[str, str] | None = None) -> str:
    """The note of a comparison in Markdown: verdict, command, tables, figure.

    Args:
        comparison: The results.
        cutoff: K of the tables.
        command: The words of the command.
        place: Ids of the experiment and of the parent run, for links; ``None`` if they are not known.
    """
    frame = comparison_frame(comparison, cutoff)
    parts = [f"**{verdict(comparison, cutoff)}**"]
    run_ids = [result.run_id for result in comparison.results if result.run_id is not None]
    if place is not None and run_ids:
        metric, ids = f"val/ndcg_at_{cutoff}/mean", run_ids[:_MOST_RUNS]
        parts.append(
            f"[Validation by round]({metric_path(place[0], ids, metric)}) · "
            f"[the runs side by side]({compare_path(place[0], ids)})"
        )
    parts.append(markdown(frame.drop(columns="kind")))
    if place is not None:
        image = f"get-artifact?path=clients.png&run_uuid={place[1]}"
        parts.append(f"![NDCG@{cutoff} of each client]({image})")
    if comparison.differences:
        baseline = display_name(comparison.differences[0].baseline)
        table = markdown(significance_text(comparison))
        parts += [f"NDCG@{cutoff} minus that of {baseline}:", f"{table}\n{significance_caption(comparison)}"]
    if command:
        parts.insert(1, f"`{shlex.join(['fellrec', *command])}`")
    if comparison.measured_with:
        parts.append(f"Measured: {comparison.measured_with}.")
    text = ""
    for part in parts:
        if len(text) + len(part) > _MOST_CHARACTERS:
            return f"{text}More tables are among the artifacts."
        text += f"{part}\n\n"
    return text.rstrip()


def verdict(comparison: Comparison, cutoff: int) -> str:
    """The best learned rule and how sure its lead over the reference is, in one line.

    It reports no clear difference unless the adjusted p-value is below 0.05.
    """
    metric, rules = f"ndcg_at_{cutoff}", comparison.rules("learned")
    means: Mapping[str, float] = {rule: comparison.mean_and_sd(rule, f"{metric}/mean")[0] for rule in rules}
    best = max(means, key=lambda rule: means[rule])
    text = f"{display_name(best)}: NDCG@{cutoff} {means[best]:.4f}, mean over clients"
    if len(rules) == 1:
        return f"{text}."
    found = [d for d in comparison.differences if d.metric == metric]
    against = next((d for d in found if d.rule == best), None)
    if against is None and found:  # the reference is the best: the nearest of the others says how sure that is
        against = max(found, key=lambda d: means[d.rule])
    return f"{text}, the best of {len(rules)}." + ("" if against is None else f" {_difference_text(against)}")


def _difference_text(found: Difference) -> str:
    interval = "" if found.user_interval is None else ", 95 % [{:+.4f}, {:+.4f}]".format(*found.user_interval)
    is_clear = found.holm_p < _LEVEL
    return (
        f"{display_name(found.rule)} minus {display_name(found.baseline)}, over {found.num_users} users: "
        f"{found.user_difference:+.4f}{interval}, p = {p_text(found.holm_p).lstrip('=')}: "
        f"{'a clear difference' if is_clear else 'no clear difference'}."
    )


def dataset_of(config: DictConfig, data: PreparedData) -> DatasetInput:
    """The data set as MLflow shows it."""
    roots = [str(node.root or "embedded") for node in data_nodes(config).values()]
    return DatasetInput(data.name, data.key, ", ".join(roots), data.statistics)
