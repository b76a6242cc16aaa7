"""Settings of ``fellrec attack``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fellrec.functional.ranges import Count, check, items, whole


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
    users_per_client: Annotated[
        Sequence[int], items(whole(1), "a list of whole numbers of at least 1, such as [1,5,20]")
    ] = (1, 5, 20)
    """Users of each client whose first update is attacked; these clients are new groups of the run's users."""
    update_clients: Count = 10
    """Clients whose updates are attacked, for each number of users."""
    users: Count = 100
    """Users on whom adapters are compared, by membership and client_inference."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "attack")
