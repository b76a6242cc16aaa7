"""What is known of an aggregation rule before PyTorch is imported: for ``fellrec list`` and for early refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["reference", "average", "LoRA-aware", "fair", "personalised", "robust", "asynchronous"]

ADAPTERS = {
    "lora": "LoraAdapter",
    "lora_heads": "LoraHeadsAdapter",
    "lora_mixed": "LoraMixedAdapter",
    "lora_sb": "LoraSBAdapter",
}
"""Choices of ``adapter`` that a rule may need → how the names of their classes end."""


def _choice_of(target: str) -> str:
    """The choice of ``adapter`` that a class belongs to, or the class's name."""
    name = target.rpartition(".")[2]
    return {**{kind: choice for choice, kind in ADAPTERS.items()}, "FullAdapter": "full"}.get(name, name)


@dataclass(frozen=True)
class Limits:
    """What a rule cannot be combined with.

    Attributes:
        needs_lora: It reads the factors A and B: not with adapters other than ``lora``.
        needs_adapter: The one choice of ``adapter`` that it works with, if that is another one; see `ADAPTERS`.
        whole_model: Not with ``split.transport`` other than ``none``.
        no_remote_server: Not with ``split.transport=distributed``: it needs to know the layers of the body.
        one_process: Not with several processes.
        all_clients: Not with ``participation.rate`` below 1.
        least_clients: Smallest number of clients in a round.
        least_because: The settings that it follows from.
        no_transforms: Not with ``exchange.transforms``.
        changes_base: It changes the frozen weights: not with ``backbone.quantize``.
        one_rank: Not with different ranks in ``adapter.rank``.
        asynchronous: Not with what needs a cohort that is drawn at once: ``participation=power_of_choice`` and
            ``poisson``, and ``participation.over_selection``.
        needs_public_users: Not with ``data.public_user_rate=0``: the server trains on the public users.
        reads_steps: It reads the clients' numbers of optimiser steps: not with ``privacy``.
    """

    needs_lora: bool = False
    needs_adapter: str = ""
    whole_model: bool = False
    no_remote_server: bool = False
    one_process: bool = False
    all_clients: bool = False
    least_clients: int = 1
    least_because: str = ""
    no_transforms: bool = False
    changes_base: bool = False
    one_rank: bool = True
    asynchronous: bool = False
    needs_public_users: bool = False
    reads_steps: bool = False

    def texts(self) -> list[str]:
        """What cannot be combined with the rule, in words.

        Example:
            >>> Limits(needs_lora=True, least_clients=5).texts()
            ['adapters other than lora', 'fewer than 5 clients in a round']
        """
        found = {
            "adapters other than lora": self.needs_lora,
            f"adapters other than {self.needs_adapter}": bool(self.needs_adapter),
            "split.transport other than none": self.whole_model,
            "split.transport=distributed": self.no_remote_server and not self.whole_model,
            "several processes": self.one_process,
            "participation.rate below 1, participation.dropout and participation=trace": self.all_clients,
            f"fewer than {self.least_clients} clients in a round": self.least_clients > 1,
            "exchange.transforms": self.no_transforms,
            "backbone.quantize": self.changes_base,
            "participation=power_of_choice or poisson and participation.over_selection": self.asynchronous,
            "data.public_user_rate=0": self.needs_public_users,
            "privacy": self.reads_steps,
        }
        return [text for text, applies in found.items() if applies]

    def problems(self, name: str, config: Mapping[str, Any]) -> list[str]:
        """What of a composed configuration, plain values, the rule ``name`` cannot work with; one line each.

        Example:
            >>> Limits(all_clients=True).problems("afl", {"participation": {"rate": 0.5}})
            ['aggregation afl needs every client in every round: participation.rate=0.5 is not allowed, leave it at 1']
        """
        found = [*self._of_cohorts(config), *self._of_models(config)]
        return [f"aggregation {name} {problem}" for problem in found if problem]

    def _of_cohorts(self, config: Mapping[str, Any]) -> list[str | None]:
        """Problems with who takes part in a round."""
        rate, clients = _at(config, "participation.rate", 1), _at(config, "partition.num_clients", None)
        dropout, over = _at(config, "participation.dropout", 0), _at(config, "participation.over_selection", 1)
        sampler = str(_at(config, "participation.sampler._target_", "")).rpartition(".")[2]
        unit = _at(config, "privacy.unit", "none")
        because = f"with {self.least_because} " if self.least_because else ""
        few = isinstance(clients, int) and isinstance(rate, (int, float)) and max(1, round(rate * clients))
        return [
            f"needs every client in every round: participation.rate={rate} is not allowed, leave it at 1"
            if self.all_clients and rate != 1
            else None,
            f"needs every client in every round: participation.dropout={dropout} is not allowed, leave it at 0"
            if self.all_clients and dropout
            else None,
            "needs every client in every round: participation=trace is not allowed, use default"
            if self.all_clients and sampler == "TraceSampler"
            else None,
            "is asynchronous and has no cohort to choose by loss: participation=power_of_choice is not allowed, use "
            "default, by_size or trace"
            if self.asynchronous and sampler == "PowerOfChoiceSampler"
            else None,
            "is asynchronous and replaces single clients: participation=poisson is not allowed, use default, by_size "
            "or trace"
            if self.asynchronous and sampler == "PoissonSampler"
            else None,
            f"is asynchronous, the server waits for no cohort: participation.over_selection={over} is not allowed, "
            "leave it at 1"
            if self.asynchronous and over != 1
            else None,
            f"{because}needs at least {self.least_clients} clients in a round: partition.num_clients={clients} with "
            f"participation.rate={rate} gives {few}"
            if few and few < self.least_clients
            else None,
            f"reads the clients' numbers of steps, which privacy={unit}_level does not release; use privacy=none"
            if self.reads_steps and unit != "none"
            else None,
            "trains on the public users at the server: data.public_user_rate=0 is not allowed, raise it"
            if self.needs_public_users and _at(config, "data.public_user_rate", None) == 0
            else None,
        ]

    def _of_models(self, config: Mapping[str, Any]) -> list[str | None]:
        """Problems with the adapter, where the model is, and what is exchanged."""
        adapter, ranks = _at(config, "adapter._target_", ""), _at(config, "adapter.rank", None)
        ranks = list(ranks) if isinstance(ranks, Sequence) else ranks
        devices, nodes = _at(config, "trainer.devices", 1), _at(config, "trainer.num_nodes", 1)
        transport, quantize = _at(config, "split.transport", "none"), _at(config, "backbone.quantize", None)
        return [
            f"needs LoRA's factors: adapter={_choice_of(adapter)} is not allowed, use adapter=lora"
            if self.needs_lora and adapter and not adapter.endswith(ADAPTERS["lora"])
            else None,
            f"needs adapter={self.needs_adapter}: adapter={_choice_of(adapter)} is not allowed"
            if self.needs_adapter and adapter and not adapter.endswith(ADAPTERS[self.needs_adapter])
            else None,
            "does not send the clients the others' LoRA: adapter=lora_mixed is not allowed, use adapter=lora, or "
            "aggregation=fedalt"
            if self.needs_adapter != "lora_mixed" and adapter.endswith(ADAPTERS["lora_mixed"])
            else None,
            f"needs the whole model in one process: split.transport={transport} is not allowed, use none"
            if self.whole_model and transport != "none"
            else None,
            "needs to know the layers of the server: split.transport=distributed is not allowed, use none or inprocess"
            if self.no_remote_server and transport == "distributed"
            else None,
            f"needs one process: trainer.devices={devices}, trainer.num_nodes={nodes} is not allowed, use 1 and 1"
            if self.one_process and (devices != 1 or nodes != 1)
            else None,
            "does not work with transformed updates: exchange.transforms is not allowed, use []"
            if self.no_transforms and _at(config, "exchange.transforms", [])
            else None,
            f"changes the weights of the backbone: backbone.quantize={quantize} is not allowed, leave it out"
            if self.changes_base and quantize
            else None,
            f"needs clients with one rank: adapter.rank={ranks} is not allowed, give one number"
            if self.one_rank and len(_ranks(ranks)) > 1
            else None,
        ]


def _ranks(given: Any) -> set[int]:
    """The ranks that ``adapter.rank`` may give clients."""
    if isinstance(given, Mapping):
        return set(given.values())
    return set(given) if isinstance(given, Sequence) else {given}


def _at(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value under a dotted key, or a default."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return default if node is None else node


@dataclass(frozen=True)
class About:
    """A line of ``fellrec list aggregation``.

    Attributes:
        name: As in ``aggregation=NAME``.
        title: Its name in tables, figures and MLflow; no other rule has it.
        family: What kind of rule it is.
        summary: What it does, in one sentence.
        paper: Who proposed it, when and where.
        sees: What it reads of the clients' adapters, see ``AggregationCallback.sees``.
        cost: What it costs beyond FedAvg, for clients, server and traffic.
        limits: What it cannot be combined with.
        is_exact: Whether the weights of the layers that LoRA adapts are afterwards those before plus the mean of the
            clients' products, ``W + s Σ p_k B_k A_k``, to rounding.
        module: Module of ``fellrec.aggregation`` that has the class; ``None``: the class name in lower case.
    """

    name: str
    title: str
    family: Family
    summary: str
    paper: str
    sees: Literal["nothing", "sums", "adapters"] = "adapters"
    cost: str = "none"
    limits: Limits = Limits()
    is_exact: bool = False
    module: str | None = None
