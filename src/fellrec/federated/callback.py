"""The hooks of the federated loop. A callback overrides the ones it needs; it observes and does not steer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fellrec.errors import unknown
from fellrec.types import Aggregated, ClientUpdate, Evaluation, RoundRecord, Updates

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class FederatedCallback:
    """Base of everything in the loop's ``callbacks=[…]``.

    Hooks run in the order in which they stand here and get frozen records. A method that starts with ``on_`` and is
    none of them is refused when the class is created, because ``Fabric.call`` would never call it and say nothing.

    Example:
        >>> class Misspelt(FederatedCallback):
        ...     def on_round_strat(self, loop, round_index): ...
        Traceback (most recent call last):
        TypeError: Misspelt: unknown hook 'on_round_strat'; choose from: on_round_start, ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse misspelt hooks.

        Raises:
            TypeError: If the class has a method ``on_…`` that is no hook; the nearest names come first.
        """
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            is_method = callable(value) or isinstance(value, classmethod)
            if name.startswith("on_") and is_method and name not in HOOKS:
                raise TypeError(f"{cls.__name__}: {unknown('hook', name, HOOKS)}")

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Before the first round; also after a resume."""

    def on_round_start(self, loop: FederatedLoop, round_index: int) -> None:
        """Before the cohort of round ``round_index`` (from 0) trains."""

    def on_client_start(self, loop: FederatedLoop, client: int) -> None:
        """Before client ``client`` (index in the population) trains."""

    def on_step_end(self, loop: FederatedLoop, loss: float) -> None:
        """After one optimiser step of the client that trains; ``loss`` is that step's. Called often: keep it cheap."""

    def on_client_end(self, loop: FederatedLoop, update: ClientUpdate) -> None:
        """After a client trained; ``update`` has its loss, samples, steps and seconds."""

    def on_aggregate_start(self, loop: FederatedLoop, updates: Updates) -> None:
        """After the whole cohort trained; ``updates`` is what the aggregation will see."""

    def on_aggregate_end(self, loop: FederatedLoop, aggregated: Aggregated) -> None:
        """After the aggregation; ``aggregated`` has the next adapters, matrices and values per client."""

    def on_evaluate_start(self, loop: FederatedLoop, stage: str) -> None:
        """Before an evaluation on ``stage``, ``"val"`` or ``"test"``."""

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        """After an evaluation; ``evaluation`` names its stage and round."""

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """After a round is complete, its evaluation included; ``record`` has all of it."""

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """After the last round, on success."""

    def on_exception(self, loop: FederatedLoop, error: BaseException) -> None:
        """When ``error`` ends the run; it is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to go on as if nothing had happened; empty unless overridden."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


HOOKS = tuple(name for name in vars(FederatedCallback) if name.startswith("on_"))
"""Names of all hooks, in the order in which the loop calls them."""
