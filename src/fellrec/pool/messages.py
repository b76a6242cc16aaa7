"""What ranks tell each other when every rank has a whole backbone and clients are placed on them.

One rank leads and keeps all state; the others keep none, so what a rank needs for a client comes with the order, and
goes back with the answer. A run can therefore be resumed with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fellrec.cut.messages import Message
from fellrec.federated.state import OptimizerState


@dataclass(frozen=True)
class Begin(Message):
    """From the leading rank at the beginning of a run; ``Begun`` answers.

    Attributes:
        config: The run's configuration, as YAML.
        facts: What all ranks must agree on beside it, as text.
    """

    config: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Begun(Message):
    """The backbone is loaded, and the facts agree."""


@dataclass(frozen=True)
class TrainClient(Message):
    """To a rank: train this client; ``Finished`` or ``Failed`` answers.

    Attributes:
        client: Row of its adapter in the bank.
        round_index: From 0.
        first_step: Local steps that it took in earlier rounds.
        adapter: The client's.
        moments: Of its optimiser; empty if it starts afresh.
    """

    client: int
    round_index: int
    first_step: int
    adapter: Mapping[str, Tensor]
    moments: OptimizerState


@dataclass(frozen=True)
class Finished(Message):
    """A client's update.

    Attributes:
        client: See ``ClientUpdate``; the same for those that follow.
        num_samples: As above.
        num_steps: As above.
        loss: As above.
        seconds: As above.
        step_losses: Of each local step.
        adapter: After local training.
        moments: Of its optimiser.
        peak_bytes: Largest memory of the rank so far.
    """

    client: int
    num_samples: int
    num_steps: int
    loss: float
    seconds: float
    step_losses: tuple[float, ...]
    adapter: Mapping[str, Tensor]
    moments: OptimizerState
    peak_bytes: int


@dataclass(frozen=True)
class Failed(Message):
    """A client's local training failed.

    Attributes:
        client: Which.
        reason: One sentence for the user.
    """

    client: int
    reason: str


@dataclass(frozen=True)
class ScoreClients(Message):
    """To a rank: rank all items for the users whom a row of a bank serves; ``Scored`` answers.

    Attributes:
        stage: ``"val"`` or ``"test"``.
        bank: See ``RunState.bank_named``.
        row: Of the bank.
        part: Of the users' batches, those whose number leaves this remainder when divided by ``num_parts``.
        num_parts: Ranks that share these users.
        adapter: The row.
    """

    stage: str
    bank: str
    row: int
    part: int
    num_parts: int
    adapter: Mapping[str, Tensor]
