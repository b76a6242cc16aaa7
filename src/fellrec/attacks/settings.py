"""Settings of ``fellrec attack``."""

from __future__ import annotations

from dataclasses import dataclass

from fellrec.functional.ranges import Count, check


@dataclass(frozen=True)
class AttackSettings:
    """How much is attacked, and how hard."""

    rows: Count = 64
    """Training rows that the attacked messages are about, spread evenly over clients."""
    guesses: Count = 10
    """Guesses for each token and target, K of the metrics ``…_at_K``."""
    inverter_steps: Count = 300
    """Steps of the training of an inverter on public text, for each depth."""
    gradient_steps: Count = 100
    """Steps of gradient matching, for each client's batch."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "attack")
