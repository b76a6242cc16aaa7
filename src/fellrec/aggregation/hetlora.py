"""HetLoRA (Cho et al., EMNLP 2024) and RBLA (Chen et al., 2024): means of factors of different ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import HetLoRASettings, RankWeights, RBLASettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.functional.lora import is_factor, mean_by_rank, product_norms, tail_norms


class MeansOfRanks(AggregationCallback):
    """What both rules have in common: factors are padded with zeros, each client gets the part of its rank.

    A row of A, and column of B, that no client of the round has stays as it is at the server. The ranks that clients
    train are at first those of ``adapter.rank``.
    """

    population = SharedModel
    weights: RankWeights
    only_present: bool

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Weighted means of all rows and columns; other parameters are averaged with the same weights."""
        ranks = self.next_ranks(updates)
        weights = self.rank_weights(updates, ranks)
        adapter = updates.weighted_sums(weights)
        for layer, a, b in factors(updates):
            old_a, old_b = (updates.model.get(name) for name in (layer.a, layer.b))
            adapter[layer.a] = mean_by_rank(a, weights, ranks, self.only_present, old_a)
            columns = mean_by_rank(
                b.transpose(1, 2), weights, ranks, self.only_present, None if old_b is None else old_b.T
            )
            adapter[layer.b] = columns.T
        vectors = {"update_weight": weights, **({"rank": ranks.double()} if self.changes_ranks else {})}
        changed = ranks != ranks_of(updates)
        rank_of_row = zip(updates.clients, ranks.tolist(), changed.tolist(), strict=True)
        return replace(
            self.shared(updates, adapter, vectors),
            ranks={row: rank for row, rank, is_changed in rank_of_row if is_changed},
        )

    def next_ranks(self, updates: Updates) -> Tensor:
        """The rank that each client sends, and has from now on, ``[N]``."""
        return ranks_of(updates)

    def rank_weights(self, updates: Updates, ranks: Tensor) -> Tensor:
        """The clients' weights, ``[N]`` float64 with sum 1; equal where all products are 0."""
        if self.weights != "norms":
            return self.client_weights(updates, self.weights)
        squares = torch.zeros(len(updates.clients), dtype=torch.float64)
        for layer, a, b in factors(updates):
            has = (torch.arange(a.shape[1]) < ranks[:, None]).to(a)
            squares += (layer.scale * product_norms(a * has[:, :, None], b)).square()
        norms = squares.sqrt()
        return norms / norms.sum() if norms.any() else self.client_weights(updates, "equal")


def ranks_of(updates: Updates) -> Tensor:
    """The rank of each client in this round, ``[N]``."""
    if updates.ranks is not None:
        return updates.ranks
    rank = updates.end[updates.layers[0].a].shape[1] if updates.layers else 0
    return torch.full((len(updates.clients),), rank)


def first_pruned(ranks: Tensor, prune_to: float) -> Tensor:
    """The first row of A that goes when an adapter is pruned: ``max(1, ⌊γr⌋)``."""
    return (ranks * prune_to + 1e-9).floor().long().clamp_min(1)


@dataclass(frozen=True)
class TailPenalty(LocalTerm):
    """The loss ``strength · Σ ‖B[:, γr:]‖ ‖A[γr:]‖`` over layers, r the rank of the adapter that was received.

    Both factors of a layer are on the same side of a cut.
    """

    strength: float
    prune_to: float

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """See ``LocalTerm``; the rank is the number of rows of A that are not 0."""
        total: Tensor | None = None
        for name in parameters:
            other = name.replace(".lora_A.", ".lora_B.")
            if not is_factor(name, "A") or other not in parameters:
                continue
            rank = context.received[name].any(dim=1).sum()[None]
            found = tail_norms(parameters[name][None], parameters[other][None], first_pruned(rank, self.prune_to))[0]
            total = found if total is None else total + found
        return None if total is None else self.strength * total


class HetLoRA(MeansOfRanks, HetLoRASettings):
    """Means in which a client without a row counts as one with zeros, by default weighted by ``‖B_k A_k‖``.

    With ``prune_to`` a client drops its last rows before it sends its adapter, if their product has become smaller. In
    the round in which it does, the ledger counts the bytes of the old rank.
    """

    only_present = False

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        if self.prune_to is not None:
            self.changes_ranks = True
            self.local_terms = [TailPenalty(self.prune_strength, self.prune_to)] if self.prune_strength else []

    def next_ranks(self, updates: Updates) -> Tensor:
        """Smaller ones for clients whose last rows have become smaller."""
        ranks = ranks_of(updates)
        if self.prune_to is None:
            return ranks
        first = first_pruned(ranks, self.prune_to)
        before, after = (torch.zeros(len(ranks), dtype=torch.float64) for _ in range(2))
        for layer, a, b in factors(updates):
            before += tail_norms(updates.start[layer.a].double(), updates.start[layer.b].double(), first)
            after += tail_norms(a, b, first)
        return torch.where(after < before, first, ranks)


class RBLA(MeansOfRanks, RBLASettings):
    """Means of each row over the clients that have it."""

    only_present = True
