"""FFA-LoRA (Sun et al., ICLR 2024), RoLoRA (Chen et al., NeurIPS 2025) and FedSA-LoRA (Guo et al., ICLR 2025).

They differ in which of the factors A and B is trained, and which is exchanged.
"""

from __future__ import annotations

from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.lora import FedSALoRASettings, FFALoRASettings, RoLoRASettings
from fellrec.functional.lora import is_factor


class FFALoRA(MeanRule, FFALoRASettings):
    """B is trained and averaged; A stays as it was drawn, so that ``Σ p_k B_k A`` is the product of the mean of B."""

    def trains(self, name: str, round_index: int) -> bool:
        """Everything but A."""
        return not is_factor(name, "A")


class RoLoRA(MeanRule, RoLoRASettings):
    """Even rounds, from 0, train and average B with a common A, odd rounds A with a common B.

    B is first: where B is 0, the gradient of A is 0.
    """

    def trains(self, name: str, round_index: int) -> bool:
        """Everything but the factor that is not in turn."""
        return not is_factor(name, "A" if round_index % 2 == 0 else "B")


class FedSALoRA(MeanRule, FedSALoRASettings):
    """Both factors are trained, A is averaged, B stays with its client.

    A client that misses a round finds its B beside an A that has moved.
    """

    def exchanges(self, name: str, round_index: int) -> bool:
        """Everything but B."""
        return not is_factor(name, "B")
