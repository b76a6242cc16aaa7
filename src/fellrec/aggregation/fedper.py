"""FedPer (Arivazhagan et al., 2019): a part of the adapter is personal, the rest is averaged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.base import Weights
from fellrec.aggregation.settings.personalised import FedPerSettings, Personal
from fellrec.errors import ConfigError
from fellrec.federated.populations import SharedModel
from fellrec.functional.names import is_lora_b, layer_of


class PartlyPersonal(MeanRule):
    """Base of rules that average a part of the adapter and leave the other part, ``personal``, to its client."""

    population = SharedModel
    personal: Personal
    weights: Weights

    def is_personal(self, name: str) -> bool:
        """Whether a parameter never leaves its client."""
        if self.personal == "tail":
            return self.part_of(name) == "tail"
        if self.personal == "b":
            return is_lora_b(name)
        return layer_of(name) in self.personal

    def begin(self, initial: Mapping[str, Tensor]) -> None:
        """See ``AggregationCallback``.

        Raises:
            ConfigError: If nothing is personal, or nothing shared.
        """
        num_personal = sum(map(self.is_personal, initial))
        if initial and num_personal in (0, len(initial)):
            which = "all" if num_personal else "none"
            raise ConfigError(
                f"aggregation {self.name}: with aggregation.personal={self.personal}, {which} of the adapter's "
                f"{len(initial)} parameters are personal; needed are some, but not all"
            )

    def exchanges(self, name: str, round_index: int) -> bool:
        """What is not personal."""
        return not self.is_personal(name)


class FedPer(PartlyPersonal, FedPerSettings):
    """FedAvg of the shared part; both parts are trained together."""
