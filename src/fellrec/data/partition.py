"""Partitions: assign users to clients.

A partition reads the training interactions of all users centrally. This is part of the simulation: in a real federation
the clients are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.schema import NO_VALUE, Catalogue
from fellrec.data.settings import (
    AttributeSettings,
    DirichletSettings,
    KMeansSettings,
    PerUserSettings,
    RandomSettings,
)
from fellrec.errors import ConfigError, DataError, unknown


@dataclass(frozen=True)
class PartitionInput:
    """Input of a partition; user ``u`` is row ``u`` of ``train`` and ``users``.

    Attributes:
        train: Training interactions of the users to assign.
        users: Attributes of these users.
        catalogue: The items.
    """

    train: Ragged
    users: pd.DataFrame
    catalogue: Catalogue


class Partition(Protocol):
    """Interface of ``partition``."""

    def assign(self, given: PartitionInput) -> IntArray:
        """Return one label per user, ``[U]``; labels need not be consecutive."""


class KMeansPartition(KMeansSettings):
    """k-means on length-normalised factors of the binary user-item matrix (METHOD §2).

    Without the normalisation k-means clusters users by their number of interactions.
    """

    def assign(self, given: PartitionInput) -> IntArray:
        """See `Partition.assign`.

        Raises:
            DataError: If there are fewer than two users or items.
        """
        from sklearn.cluster import KMeans  # two seconds of imports, which data that are kept do not need
        from sklearn.decomposition import TruncatedSVD
        from sklearn.preprocessing import normalize

        _check_count(self.num_clients, given)
        matrix = user_item_matrix(given.train, len(given.catalogue))
        if min(matrix.shape) < 2:
            raise DataError(
                f"partition=kmeans needs at least two users and two items; there are {matrix.shape[0]} users of "
                f"clients and {matrix.shape[1]} items"
            )
        num_factors = min(self.num_factors, min(matrix.shape) - 1)
        factors = TruncatedSVD(num_factors, random_state=self.seed).fit_transform(matrix)
        labels = KMeans(self.num_clients, n_init=10, random_state=self.seed).fit_predict(normalize(factors))
        return labels.astype(np.int64)


class RandomPartition(RandomSettings):
    """Random partition into clients of nearly equal size."""

    def assign(self, given: PartitionInput) -> IntArray:
        """See `Partition.assign`."""
        _check_count(self.num_clients, given)
        labels = np.arange(len(given.train), dtype=np.int64) % self.num_clients
        return np.random.default_rng(self.seed).permutation(labels)


class AttributePartition(AttributeSettings):
    """One client per value of a user attribute, such as ``gender`` or ``occupation``."""

    def assign(self, given: PartitionInput) -> IntArray:
        """See `Partition.assign`.

        Raises:
            ConfigError: If the users do not have this attribute.
            DataError: If some have no value, unless ``on_missing`` says what to do.
        """
        if self.column not in given.users.columns:
            choices = [name for name in given.users.columns if name != "user_id"]
            if not choices:
                raise ConfigError(f"partition.column={self.column}: the users of this data set have no attributes")
            raise ConfigError(unknown("partition.column", self.column, choices))
        values = given.users[self.column].astype(object).where(given.users[self.column].notna(), "")
        values = values.astype(str).str.strip()
        is_missing = values.str.lower().isin(NO_VALUE)
        if is_missing.any() and self.on_missing == "error":
            user = given.users["user_id"][is_missing.to_numpy()].iloc[0]
            raise DataError(
                f"{int(is_missing.sum())} of {len(values)} users have no {self.column} (first: user {user!r}); "
                "partition.on_missing=client makes them a client of their own"
            )
        return pd.factorize(values.mask(is_missing, ""), sort=True)[0].astype(np.int64)


class DirichletPartition(DirichletSettings):
    """Label-skewed partition: the users of each favourite genre are distributed over clients by a Dirichlet draw."""

    def assign(self, given: PartitionInput) -> IntArray:
        """See `Partition.assign`.

        Raises:
            ConfigError: If the items have no genre.
        """
        _check_count(self.num_clients, given)
        if "genre" not in given.catalogue.attributes.columns:
            raise ConfigError("partition=dirichlet needs the item attribute genre, which this data set does not have")
        first_genre = given.catalogue.attributes["genre"].fillna("").astype(str).str.split().str[0]
        genre = pd.factorize(first_genre)[0]
        genre = np.where(genre < 0, genre.max() + 1, genre)
        counts = np.zeros((len(given.train), genre.max() + 1), dtype=np.int64)
        np.add.at(counts, (given.train.row_index, genre[given.train.values]), 1)
        generator = np.random.default_rng(self.seed)
        proportions = generator.dirichlet([self.concentration] * self.num_clients, size=counts.shape[1])
        bounds = proportions.cumsum(axis=1)[counts.argmax(axis=1)]
        draw = generator.random(len(given.train))[:, None] * bounds[:, -1:]
        return (draw > bounds).sum(axis=1).astype(np.int64)


class PerUserPartition(PerUserSettings):
    """One client per user."""

    def assign(self, given: PartitionInput) -> IntArray:
        """See `Partition.assign`."""
        return np.arange(len(given.train), dtype=np.int64)


def user_item_matrix(train: Ragged, num_items: int) -> sparse.csr_matrix:
    """Binary matrix of the training interactions, ``[U, I]`` float32."""
    distinct = train.distinct()
    ones = np.ones(len(distinct.values), dtype=np.float32)
    return sparse.csr_matrix((ones, distinct.values, distinct.offsets), shape=(len(train), num_items))


def by_size(labels: IntArray) -> IntArray:
    """Renumber labels from 0 by descending number of users; labels without users are removed.

    Example:
        >>> by_size(np.array([7, 3, 7, 7])).tolist()
        [0, 1, 0, 0]
    """
    values, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values))
    return rank[inverse]


def _check_count(num_clients: int, given: PartitionInput) -> None:
    if num_clients > len(given.train):
        raise ConfigError(
            f"partition.num_clients={num_clients} must be at most the number of users, {len(given.train)}"
        )
