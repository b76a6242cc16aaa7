"""Lightning Fabric of a process: device, precision, strategy and the other processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning import Fabric
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from omegaconf import DictConfig

from fellrec.config.instantiate import instantiate
from fellrec.distributed.meeting import MeetingStrategy
from fellrec.distributed.processes import check_cores, cluster_environment, launched_devices
from fellrec.errors import ConfigError
from fellrec.experiment.precision import AUTO, ChosenPrecision, check_precision
from fellrec.launch.garbage import end_imports

PLUGINS = (ClusterEnvironment, Precision, CheckpointIO)
"""What Fabric takes as plugins."""
_MEETING_SECONDS = 120.0
"""Processes are waited for at least so long at the start: one may have more to import, or to pre-train."""


def build_fabric(config: DictConfig, alone: bool = False) -> Fabric:
    """Lightning's Fabric with the settings of ``trainer``, which have Fabric's meaning.

    With ``strategy=auto`` and several processes, the processes are joined by gloo, whatever the device: clients are not
    data-parallel replicas, so no gradient is reduced by the strategy.

    Args:
        config: The configuration.
        alone: Whether this process has no others, whatever ``trainer.devices`` is.

    Raises:
        ConfigError: If Fabric refuses the settings, or number types do not fit together.
    """
    end_imports()
    trainer = config.trainer
    plugins = [instantiate(plugin, "trainer.plugins", of=PLUGINS) for plugin in trainer.get("plugins") or ()]
    devices, num_nodes = (1, 1) if alone else launched_devices(trainer.devices, trainer.num_nodes)
    several = devices != 1 or num_nodes != 1
    if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins.append(cluster_environment() if several else LightningEnvironment())
    if is_chosen := trainer.precision == AUTO:
        plugins.append(ChosenPrecision())
    strategy: Any = trainer.get("strategy") or "auto"
    if strategy == "auto" and several:
        patience = timedelta(seconds=max(trainer.timeout_seconds, _MEETING_SECONDS))
        strategy = MeetingStrategy(process_group_backend="gloo", timeout=patience)
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=None if is_chosen else trainer.precision,
            plugins=plugins,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}, devices={trainer.devices}, num_nodes={trainer.num_nodes}, "
            f"strategy={trainer.get('strategy')}: {str(error).splitlines()[0]}"
        ) from error
    if fabric.device.type == "cpu" and not alone and isinstance(trainer.devices, int):
        check_cores(trainer.devices)
    check_precision(config, fabric.device)
    return fabric
