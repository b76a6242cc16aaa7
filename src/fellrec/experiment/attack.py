"""Attacks on a finished run: from its directory to findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fellrec.attacks import ON_CUT
from fellrec.attacks.findings import Finding
from fellrec.attacks.observe import Observed, Tap, observe, one_step, with_items
from fellrec.attacks.on_cut import findings_at
from fellrec.attacks.public import knowing
from fellrec.attacks.settings import AttackSettings
from fellrec.config.instantiate import as_dict
from fellrec.cut.client_model import CutClientModel
from fellrec.errors import ConfigError
from fellrec.experiment.attack_whole import attack_whole
from fellrec.experiment.attackable import check_attacks
from fellrec.experiment.build import Recommender, backbone_path
from fellrec.experiment.federation import Federation
from fellrec.experiment.restore import data_of, restore
from fellrec.experiment.store import store_of
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.executor import SerialExecutor
from fellrec.federated.ledger import Ledger
from fellrec.federated.local import LocalTrainer
from fellrec.federated.records import Job
from fellrec.functional.by_size import distinct_numbers
from fellrec.models.backbone import load_shape
from fellrec.models.remote import Cut
from fellrec.tracking.run_log import NewRun, is_logged, open_log

_LARGER_THAN_ANY = 10**9
"""Training samples that no client has: heads of these depths exist, and no client of the run has them by itself."""


def attack(
    run_dir: Path,
    config: DictConfig,
    names: Sequence[str],
    depths: Sequence[int] | None,
    settings: AttackSettings,
) -> list[Finding]:
    """Attack a finished run.

    Args:
        run_dir: Of the run.
        config: Its configuration, see ``read_config``.
        names: Of attacks, see ``fellrec.attacks.ATTACKS``.
        depths: Layers of the head; ``None`` for `default_depths`.
        settings: How much is attacked.

    Raises:
        ConfigError: If an attack is unknown or does not fit the run, the run is not finished, or a setting of the run
            cannot be attacked.
        BackboneError: If a depth leaves the server no layer.
    """
    check_attacks(config, names)
    on_cut = [name for name in names if name in ON_CUT]
    on_whole = [name for name in names if name not in ON_CUT]
    depths = check_depths(config, depths) if on_cut else []
    data = data_of(run_dir, config)
    findings = []
    if depths:
        cut = config.copy()
        cut.trainer.batch_size = max(1, settings.rows // min(settings.rows, data.num_clients))
        with_depths(cut, depths)
        recommender, federation = restore(run_dir, cut, data, "inprocess")
        with_items(recommender.datamodule)
        for depth in depths:
            findings += _at_depth(recommender, federation, depth, on_cut, settings)
    if on_whole:
        whole = config.copy()
        recommender, federation = restore(run_dir, whole, data, "none")
        findings += attack_whole(whole, recommender, federation, on_whole, settings)
    return findings


def check_tracked(run_dir: Path, config: DictConfig) -> None:
    """Refuse to log to a run that is not tracked.

    Raises:
        ConfigError: If it has no MLflow run.
    """
    if store_of(config) is None or not is_logged(run_dir):
        raise ConfigError(f"--log: {run_dir} is not tracked by MLflow; leave out --log")


def log_findings(run_dir: Path, config: DictConfig, findings: Sequence[Finding], name: str) -> None:
    """Log findings to the run in MLflow, as ``attack/nearest_embedding/token_at_1`` with the depth as the step.

    The step of attacks on updates is the number of users a client; of others it is 0.

    Args:
        run_dir: Of a run for which `check_tracked` holds.
        config: Of the run.
        findings: Of the attack.
        name: Of the attack's output; findings with the same name are logged once.
    """
    log = open_log(run_dir, NewRun(store_of(config), config.tracking.experiment, "", {}))
    for finding in findings:
        metrics = {f"attack/{finding.attack}/{metric}": value for metric, value in finding.metrics.items()}
        step = finding.depth if finding.depth is not None else finding.users_per_client or 0
        log.log_metrics(metrics, step, once=f"{name} {finding.attack}")
    log.close()


def check_depths(config: DictConfig, depths: Sequence[int] | None) -> list[int]:
    """The depths, ascending.

    Args:
        config: Of the run.
        depths: As given; ``None`` for `default_depths`.

    Raises:
        BackboneError: If one leaves the server no layer of the backbone.
    """
    num_layers, tail = _num_layers(config), config.split.tail_layers
    if depths is None:
        return default_depths(num_layers - tail - 1, distinct_numbers(as_dict(config.split)["head_layers"]))
    for depth in depths:
        Cut(depth, tail, num_layers).require_body()
    return sorted(set(depths))


def default_depths(most: int, own: Sequence[int]) -> list[int]:
    """0, the powers of two, and the depths of the run, as far as the server has a layer.

    Args:
        most: The deepest head.
        own: Of the run.

    Example:
        >>> default_depths(5, [3]), default_depths(0, [1])
        ([0, 1, 2, 3, 4], [0])
    """
    powers = [2**power for power in range(max(most, 1).bit_length())]
    return sorted(depth for depth in {0, *powers, *own} if depth <= most)


def with_depths(config: DictConfig, depths: Sequence[int]) -> None:
    """Let the model of a configuration be cut at these depths, and at 0, where the public embeddings are."""
    if list(depths) == [0]:
        config.split.head_layers = 0
        return
    others = [depth for depth in depths if depth]
    OmegaConf.update(
        config,
        "split.head_layers",
        {0: 0, **{_LARGER_THAN_ANY + number: depth for number, depth in enumerate(others)}},
        merge=False,
    )


def _num_layers(config: DictConfig) -> int:
    if config.backbone.name == "hf":
        return int(load_shape(backbone_path(config)[0])[0].num_hidden_layers)
    return int(config.backbone.num_layers)


def _at_depth(
    recommender: Recommender, federation: Federation, depth: int, names: Sequence[str], settings: AttackSettings
) -> list[Finding]:
    """The findings of attacks on the cut at one depth."""
    link, fabric = recommender.link, recommender.fabric
    assert link is not None
    assert isinstance(federation.executor, SerialExecutor)
    tap = Tap(link.transport)
    link.connect(tap, Ledger())
    heads = [depth] * recommender.data.num_clients
    model = CutClientModel(WholeClientModel(recommender.module, recommender.base), link, heads)
    trainer = one_step(federation.executor.trainer, model)
    observed = list(_observed(trainer, tap, federation, settings.rows))
    if not observed:
        raise ConfigError("no client of the run has a training target: there is nothing to observe")
    initial = federation.population.initial
    with knowing(recommender.module, model, initial, trainer.datamodule, trainer.seed, fabric) as public:
        return findings_at(public, observed, names, recommender.backbone.tokenizer, settings)


def _observed(trainer: LocalTrainer, tap: Tap, federation: Federation, rows: int) -> Iterator[Observed]:
    """What the server sees of the first clients, each with the adapter that the run has selected for it."""
    round_index = federation.progress.round_index
    jobs = {client: job for job in federation.selection.score_jobs() for client in job.clients}
    for client in sorted(jobs)[:rows]:
        if trainer.datamodule.num_samples(client):
            job = jobs[client]
            yield observe(trainer, tap, Job(job.row, client, round_index, 0, job.adapter, base=job.base))
