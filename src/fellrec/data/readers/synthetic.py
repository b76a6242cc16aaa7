"""The embedded data set: readable, seeded, and heterogeneous because it was made so.

It shows the mechanism of federated training and is no evidence about real data.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd

from fellrec.data.schema import RawData
from fellrec.data.settings import SyntheticSettings

_GENRES = ("Drama", "Comedy", "Thriller", "Romance", "Sci-Fi", "Western", "Horror", "Musical")
_ADJECTIVES = (
    "Silent Golden Broken Hidden Crimson Distant Frozen Burning Gentle Hollow Velvet Restless Bitter Emerald Paper "
    "Lonely Electric Wild Sacred Midnight"
).split()
_NOUNS = (
    "Harbour Garden Mirror Orchard Station Lantern Compass Canyon Letter Sparrow Bridge Engine Island Winter Circus "
    "Ladder Empire Forest Signal River Tower Feather Market Shadow Anchor"
).split()


class SyntheticReader(SyntheticSettings):
    """Films with genres, and groups of users whose tastes differ and whose habits partly contradict each other.

    A user picks the next film either by habit (the group's successor of the last film) or by taste (a genre that the
    group likes, popular films first). Some of the habits are shared by all groups; the others send the same film to
    different successors in different groups, so no single model can serve all groups perfectly.
    """

    def read(self) -> RawData:
        """Make the data."""
        generator = np.random.default_rng(self.seed)
        genre = generator.integers(len(_GENRES), size=self.num_items)
        popularity = 1.0 / (1.0 + generator.permutation(self.num_items)) ** 0.8
        sizes = 0.7 ** np.arange(self.num_groups)
        group = generator.choice(self.num_groups, size=self.num_users, p=sizes / sizes.sum())
        taste = generator.dirichlet([0.25] * len(_GENRES), size=self.num_groups)
        by_taste = popularity[None, :] * taste[:, genre] + 0.02 * popularity[None, :]
        by_taste /= by_taste.sum(axis=1, keepdims=True)
        successors = self._successors(generator)
        sequences = self._walk(generator, group, by_taste, successors)
        return RawData(*self._frames(generator, sequences, group, genre))

    def fingerprint(self) -> str:
        """All settings."""
        return f"synthetic-1:{sorted(asdict(self).items())}"

    def _successors(self, generator: np.random.Generator) -> np.ndarray:
        """``[G, I]``: the film that each group likes to see after each film; permutations."""
        shared = generator.permutation(self.num_items)
        successors = np.tile(shared, (self.num_groups, 1))
        own = np.flatnonzero(generator.random(self.num_items) >= self.shared_rate)
        for group in range(self.num_groups):
            successors[group, own] = shared[generator.permutation(own)]
        return successors

    def _walk(
        self, generator: np.random.Generator, group: np.ndarray, by_taste: np.ndarray, successors: np.ndarray
    ) -> list[np.ndarray]:
        """One sequence of distinct films per user; all users take a step at a time."""
        lengths = np.clip(generator.poisson(self.mean_length, size=self.num_users), 5, 2 * self.mean_length)
        seen = np.zeros((self.num_users, self.num_items), dtype=bool)
        films = np.full((self.num_users, int(lengths.max())), -1, dtype=np.int64)
        everyone = np.arange(self.num_users)
        for step in range(films.shape[1]):
            weights = by_taste[group] * ~seen
            cumulative = weights.cumsum(axis=1)
            draw = generator.random(self.num_users)[:, None] * cumulative[:, -1:]
            chosen = np.minimum((draw > cumulative).sum(axis=1), self.num_items - 1)
            if step > 0:
                habit = successors[group, films[:, step - 1]]
                follows = (generator.random(self.num_users) < self.habit_rate) & ~seen[everyone, habit]
                chosen = np.where(follows, habit, chosen)
            films[:, step] = chosen
            seen[everyone, chosen] = True
        return [films[user, : lengths[user]] for user in everyone]

    def _frames(
        self, generator: np.random.Generator, sequences: list[np.ndarray], group: np.ndarray, genre: np.ndarray
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        titles = [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
        chosen = generator.permutation(len(titles))[: self.num_items]
        items = pd.DataFrame(
            {
                "item_id": [f"film{number:03d}" for number in range(self.num_items)],
                "title": [titles[index] for index in chosen],
                "genre": [_GENRES[index] for index in genre],
            }
        )
        users = pd.DataFrame(
            {
                "user_id": [f"user{number:04d}" for number in range(self.num_users)],
                "group": [f"group{number}" for number in group],
            }
        )
        lengths = [len(films) for films in sequences]
        starts = generator.uniform(0, 1e6, size=self.num_users)
        steps = generator.exponential(3600, size=sum(lengths)) + 1.0
        position = np.concatenate([np.arange(length) for length in lengths])
        owner = np.repeat(np.arange(self.num_users), lengths)
        clock = pd.Series(steps).groupby(owner).cumsum().to_numpy()
        interactions = pd.DataFrame(
            {
                "user_id": users["user_id"].to_numpy()[owner],
                "item_id": items["item_id"].to_numpy()[np.concatenate(sequences)],
                "timestamp": np.round(starts[owner] + clock + position, 3),
            }
        )
        return interactions, items, users
