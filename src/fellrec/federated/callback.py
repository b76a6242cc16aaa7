"""The hooks of the federated loop. A callback overrides the ones it needs; it observes and does not steer."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

from fellrec.errors import unknown
from fellrec.federated.records import Aggregated, FitResult, FitStart, Job, RoundRecord, Trained, Updates
from fellrec.types import Evaluation


class FederatedCallback:
    """Base of everything in the loop's list of callbacks.

    Hooks run in the order in which they are defined here and receive frozen records. A method whose name starts with
    ``on_`` and that is not a hook is refused when the class is created.

    Example:
        >>> class Misspelt(FederatedCallback):
        ...     def on_round_strat(self, round_index): ...
        Traceback (most recent call last):
        TypeError: Misspelt: unknown hook 'on_round_strat'; choose from: on_round_start, ...
    """

    events: Events
    """The loop's events, set when the run starts; ``self.events.stop()`` ends the run after the current round."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse hooks that the loop cannot call.

        Raises:
            TypeError: If the class has a method ``on_…`` that is not a hook; the nearest names come first. If a hook
                does not take what the loop gives it.
        """
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            is_method = callable(value) or isinstance(value, classmethod)
            if name.startswith("on_") and is_method and name not in HOOKS:
                raise TypeError(f"{cls.__name__}: {unknown('hook', name, HOOKS)}")
            if name.startswith("on_") and inspect.isfunction(value):
                _check_parameters(
                    cls.__name__, value, tuple(inspect.signature(getattr(FederatedCallback, name)).parameters)
                )

    def log_metric(self, name: str, value: float) -> None:
        """Log a figure of the current round to MLflow; nothing where the run is not tracked.

        Args:
            name: Such as ``"friends/mutual"``.
            value: A number. A resumed run that repeats a round does not log it again.
        """
        self.events.log_metric(f"{type(self).__name__} {name}", name, value)

    def on_fit_start(self, fit: FitStart) -> None:
        """Before the first round; also after a resume."""

    def on_round_start(self, round_index: int) -> None:
        """Before the cohort of round ``round_index`` (from 0) trains."""

    def on_client_start(self, job: Job) -> None:
        """Before a client trains."""

    def on_step_end(self, loss: float) -> None:
        """After an optimiser step of the client that trains, with the step's loss. Called often: keep it cheap."""

    def on_client_end(self, trained: Trained) -> None:
        """After a client trained; its result is stored."""

    def on_aggregate_start(self, updates: Updates) -> None:
        """After the whole cohort trained; ``updates`` is what the aggregation rule sees."""

    def on_aggregate_end(self, aggregated: Aggregated) -> None:
        """After the aggregation; ``aggregated`` has the next adapters, matrices and values per client."""

    def on_evaluate_start(self, stage: str) -> None:
        """Before an evaluation on ``stage``, ``"val"`` or ``"test"``."""

    def on_users_scored(self, done: int, total: int) -> None:
        """After a batch of an evaluation: ``done`` of the ``total`` users that are ranked in it are. Keep it cheap."""

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """After an evaluation; ``evaluation`` names its stage and round."""

    def on_round_end(self, record: RoundRecord) -> None:
        """After a round is complete, its evaluation included."""

    def on_fit_end(self, result: FitResult) -> None:
        """After the test of a run that succeeded."""

    def on_exception(self, error: BaseException) -> None:
        """When ``error`` ends the run; it is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: JSON values, tensors and ``StoredTensors``; empty unless overridden."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


HOOKS = tuple(name for name in vars(FederatedCallback) if name.startswith("on_"))
"""Names of all hooks, in the order in which the loop calls them."""


def _check_parameters(owner: str, hook: FunctionType, expected: tuple[str, ...]) -> None:
    signature = inspect.signature(hook)
    try:
        signature.bind(*expected)
    except TypeError:
        given, needed = (f"{hook.__name__}({', '.join(names)})" for names in (signature.parameters, expected))
        raise TypeError(f"{owner}.{given}: needed is {needed}") from None


LogMetrics = Callable[[Mapping[str, float], int, str], None]
"""Takes metrics, the round, and a key by which the same metrics of a round are logged once."""


class Events:
    """Calls the hooks of all callbacks, in the order of the list.

    Args:
        callbacks: The aggregation rule first, then the observers.

    Attributes:
        is_stopping: Whether `stop` was called.
        seconds: In the hooks of the observers, so far.
        log_metrics: Takes what callbacks log; ``None`` for a run without a log.
    """

    def __init__(self, callbacks: Sequence[FederatedCallback] = ()) -> None:
        self.callbacks = list(callbacks)
        self.is_stopping = False
        self.seconds = 0.0
        self.log_metrics: LogMetrics | None = None
        self._round_index = 0
        self._logged: Counter[str] = Counter()
        for callback in self.callbacks:
            callback.events = self

    def stop(self) -> None:
        """End the run after the current round; the selected adapters are tested as usual."""
        self.is_stopping = True

    def log_metric(self, key: str, name: str, value: float) -> None:
        """Log a figure of the current round.

        Args:
            key: Who logs what; several values of a round are told apart by their order.
            name: Of the metric.
            value: A number.
        """
        if self.log_metrics is not None:
            self._logged[key] += 1
            self.log_metrics({name: float(value)}, self._round_index, f"{key} {self._logged[key]}")

    def client_starts(self, job: Job) -> None:
        """Call ``on_client_start``, but not for the server's own training."""
        if not job.is_at_server:
            self.call("on_client_start", job)

    def call(self, hook: str, *records: object) -> None:
        """Call one hook of every callback."""
        self._follow(hook, *records)
        before = time.perf_counter()
        for number, callback in enumerate(self.callbacks):
            getattr(callback, hook)(*records)
            now = time.perf_counter()
            self.seconds += (now - before) if number else 0.0
            before = now

    def _follow(self, hook: str, *records: object) -> None:
        """Remember which round it is."""
        if hook == "on_round_start" and isinstance(records[0], int):
            self._round_index = records[0]
            self._logged.clear()
        elif hook == "on_fit_start" and isinstance(records[0], FitStart):
            self._round_index = records[0].round_index
