"""What the machine does while a run trains, once a round: MLflow shows it as system metrics."""

from __future__ import annotations

import os

import psutil
import torch

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import RoundRecord
from fellrec.tracking.run_log import RunLog

_MEGABYTE = 1e6


class SystemMetrics(FederatedCallback):
    """Logs ``system/…`` of every round, under MLflow's own names: four figures, and one for each GPU.

    The rate of the processors is their mean since the last round; the others are of the end of the round. Reading them
    takes less than a millisecond, where MLflow's own monitor is a thread that logs a dozen figures every ten seconds.

    Args:
        log: Of the run.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self._process = psutil.Process(os.getpid())

    def on_round_start(self, round_index: int) -> None:
        """The rate of the processors counts from here."""
        psutil.cpu_percent()

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the round."""
        self.log.log_metrics(figures(self._process), record.round_index, once="system")


def figures(process: psutil.Process) -> dict[str, float]:
    """Figures of the machine and of this process now, by MLflow's names."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": process.memory_info().rss / _MEGABYTE,
    }
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        free, total = torch.cuda.mem_get_info(gpu)
        found[f"system/gpu_{gpu}_memory_usage_megabytes"] = (total - free) / _MEGABYTE
    return found
