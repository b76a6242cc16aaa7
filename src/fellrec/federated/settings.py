"""Settings of the round: ``trainer`` and ``participation``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fellrec.errors import unknown
from fellrec.functional.ranges import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    RateBelow1,
    Seconds,
    Seed,
    check,
    items,
    line,
    listed,
    number,
    one_of,
    ranges,
    whole,
)
from fellrec.functional.schedules import DECAYS

METRICS = ("ndcg", "recall", "hr", "mrr")
"""What ``trainer.metric`` can name, each followed by ``_at_`` and one of ``trainer.cutoffs``."""

Cutoffs = Annotated[
    Sequence[int], items(whole(1), "a list of whole numbers of at least 1, each once, such as [5,10]", distinct=True)
]


@dataclass(frozen=True)
class TrainerSettings:
    """How long clients train, how they are evaluated, and on which devices."""

    num_rounds: Count = 10
    """Rounds of the run."""
    local_epochs: Count = 1
    """Passes over a client's data in a round."""
    max_local_steps: Count | None = None
    """Optimiser steps of a client in a round at most; null: all. Pooled data: as many for each client."""
    batch_size: Count = 64
    """Training rows; with the retrieval objective a row has up to ``data.max_history`` targets."""
    accumulate_grad_batches: Count = 1
    """Batches whose gradients make one optimiser step."""
    eval_batch_size: Count = 256
    """Users that are evaluated at once."""
    learning_rate: Positive = 1.0e-3
    """AdamW's step size."""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled weight decay."""
    warmup_steps: Natural = 0
    """First steps of each client, counted over all rounds, in which the learning rate rises linearly."""
    learning_rate_decay: Annotated[str, one_of(*DECAYS)] = "none"
    """How the learning rate falls to 0 over ``num_rounds``."""
    gradient_clip: Positive | None = 1.0
    """Largest norm of a gradient; null: no clipping."""
    reset_optimizer: bool = False
    """Whether each client forgets its AdamW moments at the start of a round."""
    evaluate_every: Count = 1
    """Rounds between evaluations on the validation data; the last round is always evaluated."""
    patience: Count | None = None
    """Evaluations without a gain before the run stops; null: it never stops early."""
    select: Literal["population", "client", "frontier"] = "population"
    """What is tested: the best round of the population's mean, each client's own best round, or, of the rounds whose
    mean is at least ``frontier_floor`` of the best, the one with the best worst client."""
    frontier_floor: Fraction = 0.95
    """With ``select=frontier``: smallest mean over clients that is accepted, as a fraction of the best round's."""
    metric: str = "ndcg_at_10"
    """What selection and early stopping look at, on the validation data: ndcg, recall, hr or mrr at a cutoff."""
    cutoffs: Cutoffs = (5, 10, 20, 50)
    """Cutoffs k of the metrics."""
    sampled_candidates: Count | None = None
    """Items that targets are ranked among too, as metrics named ``sampled_N_…``, never used to select; null: none."""
    cold_users_below: Count = 3
    """Users with fewer training interactions are reported separately, as cold."""
    accelerator: str = "auto"
    """As in ``lightning.Fabric``: auto, cpu, cuda."""
    strategy: str = "auto"
    """As in ``lightning.Fabric``: how the processes of one run are started and communicate."""
    plugins: Annotated[Sequence[Any], listed("a list, such as [{_target_: my_module.Mine}]")] | None = None
    """As in ``lightning.Fabric``: cluster environments, as nodes with ``_target_``; null: none."""
    devices: Count | Literal["auto"] = 1
    """Processes per node, one for each GPU; clients are placed on them. auto: all that there are."""
    num_nodes: Count = 1
    """Nodes; with more than one, start the processes by srun or torchrun."""
    devices_per_client: Count = 1
    """Processes that train one client together, each on its rows of every batch."""
    clients_per_step: Count = 1
    """Clients that one process trains at once: their rows go through the frozen weights together, each with its own
    LoRA. Faster with small batches, above all on a GPU."""
    timeout_seconds: Seconds = 300
    """Longest time without a message from a process that is waited for."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "auto"] = "32-true"
    """As in ``lightning.Fabric``. bf16-true: the backbone's weights are in bfloat16, LoRA's matrices in float32.
    16-mixed: with a scaled loss, for GPUs without bfloat16. auto: the fastest of 32-true, bf16-mixed and, with frozen
    weights, bf16-true, measured at the start of the run."""
    attention: Literal["sdpa", "eager", "auto"] = "sdpa"
    """Attention of the backbone, as in transformers: sdpa, in one fused operation where the architecture has it; eager,
    by matrix products, which are faster in bfloat16 on CPUs; auto: the faster one, measured at the start of the run."""
    compile: bool = False
    """Whether the layers are compiled by ``torch.compile``. Pays on long runs with adapter=full; with LoRA there was no
    gain. Results differ in the last digits."""
    checkpoint_every: Count = 1
    """Rounds between checkpoints; what a client has trained is written to disk as soon as it is done."""
    checkpoints_kept: Count = 2
    """Checkpoints that stay on disk; if the newest is damaged, the one before it is used."""

    def __post_init__(self) -> None:
        """Check all ranges, and that ``metric`` is measured."""
        check(self, "trainer", self._unknown_metric)

    @property
    def _unknown_metric(self) -> str | None:
        if not ranges(TrainerSettings)["cutoffs"].accepts(self.cutoffs):
            return None
        metrics = [f"{name}_at_{cutoff}" for name in METRICS for cutoff in self.cutoffs]
        return None if self.metric in metrics else unknown("trainer.metric", self.metric, metrics)


AtLeast1 = Annotated[float, number(lambda x: x >= 1, "a number of at least 1")]


@dataclass(frozen=True)
class ParticipationSettings:
    """Which clients take part in a round, how long they take on the simulated clock, and what happens if one fails."""

    rate: Fraction = 1.0
    """Fraction of the clients in each round's cohort, in (0, 1]; of an asynchronous rule, that trains at any time."""
    on_failure: Literal["stop", "skip"] = "stop"
    """stop: end the run when a client's training fails. skip: leave it out of the round, which the result reports."""
    quorum: Fraction = 0.5
    """Fraction of the cohort that must finish a round, in (0, 1]."""
    over_selection: AtLeast1 = 1.0
    """Clients that are drawn for each one that the cohort needs; the first to finish by the simulated clock are kept,
    and the others are not trained."""
    dropout: RateBelow1 = 0.0
    """Probability that a client that was drawn drops out of the round: it sends nothing, and is not trained."""
    slowdown: AtLeast1 = 1.0
    """How much slower than the fastest a client can be: each has a factor of its own, log-uniform from 1 to this."""
    step_seconds: Positive = 1.0
    """Simulated seconds of a local step of the fastest clients."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "participation")


@dataclass(frozen=True)
class UniformSamplerSettings:
    """Clients are drawn uniformly, without replacement."""


@dataclass(frozen=True)
class PoissonSamplerSettings:
    """Every client is drawn with the same probability, independently of the others."""


@dataclass(frozen=True)
class BySizeSamplerSettings:
    """Clients are drawn by size, without replacement, with probabilities proportional to their training targets."""


@dataclass(frozen=True)
class TraceSamplerSettings:
    """Clients are drawn uniformly among those that a file says are available at the simulated time."""

    path: Annotated[str, line(text="a comma-separated file with the columns client, start and end")]
    """Comma-separated file with a line ``client,start,end`` for each time in which a client, from 0, can be drawn:
    simulated seconds since the start of the run, ``end`` excluded. Clients without a line never take part."""
    period: Positive | None = None
    """Simulated seconds after which the file begins again, such as 86400 for a day; null: it does not."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "participation.sampler")


@dataclass(frozen=True)
class PowerOfChoiceSamplerSettings:
    """Candidates are drawn by size; of these, the clients with the largest loss at the received model take part."""

    num_candidates: Count | None = None
    """Candidates of a round, which receive the model and measure their loss; null: twice as many as clients are needed,
    or all if they are fewer."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "participation.sampler")


Clients = Annotated[
    Sequence[int],
    items(whole(0), "a list of client numbers from 0, each once, such as [1,4]", distinct=True, least=0),
]


@dataclass(frozen=True)
class PoisonSettings:
    """Clients that misbehave, to measure what that does to the others; none by default."""

    clients: Clients = ()
    """Clients that misbehave, from 0; tables mark them, and have figures of the honest clients. []: none."""
    kind: Literal["none", "label_flip", "sign_flip", "scale", "not_finite", "copy"] = "sign_flip"
    """none: they behave, and are marked. label_flip: in their training rows every target is another item.
    sign_flip, scale: they send their update times -``scale`` or ``scale``. not_finite: every entry is NaN.
    copy: they send the adapter of the first honest client of the round."""
    scale: Positive = 10.0
    """What sign_flip and scale multiply an update by."""
    seed: Seed = 0
    """Of the permutation of items that label_flip uses."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "poison")


@dataclass(frozen=True)
class ExchangeSettings:
    """What is exchanged between clients and server."""

    transforms: Annotated[Sequence[Any], listed("a list, such as [clip,{name: quantise, bits: 4}]")] = ()
    """Applied to the updates that clients send, in this order: clip, noise, quantise, topk, with settings as in
    {name: clip, norm: 0.5}, or classes of your own as {_target_: my_module.Mine}."""
    secure: bool = False
    """Whether rules that need sums only get them by pairwise masks (docs/secure_sums.md), of fixed point numbers."""
    secure_bits: Annotated[int, whole(1, 52)] = 24
    """With ``secure``: bits after the point."""
    secure_word: Literal[32, 64] = 32
    """With ``secure``: bits of a number; sums are modulo 2 to this power."""

    def __post_init__(self) -> None:
        """Check all ranges, and that a number has bits before the point."""
        check(self, "exchange", self._without_room)

    @property
    def _without_room(self) -> str | None:
        bits, word = self.secure_bits, self.secure_word
        if word not in (32, 64) or bits <= word - 4:
            return None
        with_word = f"with exchange.secure_word={word}"
        return f"exchange.secure_bits={bits} is not allowed {with_word}: a number of at most {word - 4}"
