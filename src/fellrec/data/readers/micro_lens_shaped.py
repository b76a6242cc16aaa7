"""A made-up data set in the shape of MicroLens-100k, of any size. It is no evidence about MicroLens.

What has MicroLens's shape is named in `MicroLensShapedReader`; everything else, above all who watches what, is planted.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd

from fellrec.data.ragged import IntArray
from fellrec.data.schema import RawData
from fellrec.data.settings import MicroLensShapedSettings

MEAN_LENGTH = 719_405 / 100_000
MIN_LENGTH = 5
"""MicroLens-100k's published counts: interactions of a user."""

_SUBJECTS = {
    "anime": ("the masked swordsman", "a paper dragon", "the blue cat", "the last wizard", "my favourite villain"),
    "cooking": ("a bowl of noodles", "the street cook", "grandma's dumpling", "a burnt cake", "my spicy soup"),
    "gaming": ("the final boss", "a lucky player", "my worst team", "the hidden level", "a broken controller"),
    "pets": ("the lazy puppy", "a hungry parrot", "my neighbour's cat", "the brave hamster", "a tiny goat"),
    "travel": ("the night train", "a mountain village", "my old motorhome", "the frozen lake", "a desert road"),
    "music": ("the street singer", "a broken piano", "my first concert", "the silent drummer", "an old melody"),
    "sports": ("the young goalkeeper", "a tired runner", "the record jump", "my gym partner", "the rainy final"),
    "comedy": ("my angry boss", "the clumsy waiter", "a strange wedding", "the wrong number", "dad's new haircut"),
}
_OPENINGS = (
    "See how", "Wait until", "Episode two:", "The day", "Nobody expected this:", "Watch closely how", "In ten minutes",
    "For the first time",
)  # fmt: skip
_ACTIONS = (
    "saves the day", "changes everything", "gets lost again", "meets an old friend", "wins at last",
    "refuses to leave", "learns a new trick", "surprises everyone", "breaks all the rules", "goes completely wrong",
    "finds a way home", "makes everyone laugh", "starts from nothing", "disappears without a trace",
    "becomes a legend", "returns after years",
)  # fmt: skip
_ENDINGS = (
    "in the rain", "on a busy street", "before breakfast", "with no money", "at midnight", "in front of everyone",
    "in the countryside", "behind the school", "during the holidays", "on the rooftop", "in a small kitchen",
    "under pressure", "on live camera", "with a stranger", "in slow motion", "without any help",
)  # fmt: skip


class MicroLensShapedReader(MicroLensShapedSettings):
    """Users with few interactions on a large catalogue of short videos, in groups with tastes and habits of their own.

    Of MicroLens-100k's shape are: items a user, 7.19 interactions a user and at least 5, more users the shorter the
    history, few videos that many watch and many that few do, titles of a dozen words with a hashtag and nothing else
    about a video, ids from 1, times in milliseconds.

    A user picks the next video by habit (the group's successor of the last one), by taste (a topic that the group
    likes, popular videos first), or at random. Some of the habits are shared by all groups; the others send the same
    video to different successors in different groups. Habits are a minority, so no ranker can be near perfect.
    """

    def read(self) -> RawData:
        """Make the data."""
        num_items = self.items
        generator = np.random.default_rng(self.seed)
        topic, titles = _titles(generator, num_items)
        popularity = 1.0 / (10.0 + generator.permutation(num_items))
        sizes = 0.7 ** np.arange(self.num_groups)
        group = generator.choice(self.num_groups, size=self.num_users, p=sizes / sizes.sum())
        taste = generator.dirichlet([0.25] * len(_SUBJECTS), size=self.num_groups)
        by_taste = popularity * (taste[:, topic] + 0.02)
        successors = self._successors(generator, num_items)
        lengths = self._lengths(generator, num_items)
        videos = self._walk(generator, group, by_taste.cumsum(axis=1), successors, int(lengths.max()))
        interactions = _interactions(generator, videos, lengths)
        items = pd.DataFrame({"item_id": _ids(num_items), "title": titles})
        users = pd.DataFrame({"user_id": _ids(self.num_users), "group": [f"group{number}" for number in group]})
        return RawData(interactions, items, users)

    def fingerprint(self) -> str:
        """All settings."""
        return f"micro_lens_shaped-1:{sorted(asdict(self).items())}"

    def _lengths(self, generator: np.random.Generator, num_items: int) -> IntArray:
        """``[U]``: ``MIN_LENGTH`` and a geometric number more, at most half of the catalogue."""
        more = generator.geometric(1 / (1 + MEAN_LENGTH - MIN_LENGTH), size=self.num_users) - 1
        return np.minimum(MIN_LENGTH + more, num_items // 2)

    def _successors(self, generator: np.random.Generator, num_items: int) -> IntArray:
        """``[G, I]``: the video that each group likes to watch after each video; permutations."""
        shared = generator.permutation(num_items)
        own = np.flatnonzero(generator.random(num_items) >= self.shared_rate)
        successors = np.tile(shared, (self.num_groups, 1))
        for group in range(self.num_groups):
            successors[group, own] = shared[generator.permutation(own)]
        return successors

    def _walk(
        self,
        generator: np.random.Generator,
        group: IntArray,
        cumulative: np.ndarray,
        successors: IntArray,
        num_steps: int,
    ) -> IntArray:
        """``[U, num_steps]`` distinct videos of each user; all users take a step at a time."""
        videos = np.full((self.num_users, num_steps), -1, dtype=np.int64)
        for step in range(num_steps):
            left = np.arange(self.num_users)
            may_follow = step > 0
            while len(left):  # whoever would watch a video twice draws again, and not by habit
                kind = generator.random(len(left))
                chosen = _draw(generator, group[left], cumulative)
                anything = generator.integers(cumulative.shape[1], size=len(left))
                chosen = np.where(kind >= 1 - self.random_rate, anything, chosen)
                if may_follow:
                    chosen = np.where(kind < self.habit_rate, successors[group[left], videos[left, step - 1]], chosen)
                again = (videos[left, :step] == chosen[:, None]).any(axis=1)
                videos[left[~again], step] = chosen[~again]
                left, may_follow = left[again], False
        return videos


_TITLES_PER_TOPIC = len(_OPENINGS) * 5 * len(_ACTIONS) * len(_ENDINGS)


def _titles(generator: np.random.Generator, num_items: int) -> tuple[IntArray, list[str]]:
    """Topics ``[I]`` and distinct titles; the topic shows in the subject and the hashtag."""
    topic, number = np.divmod(generator.permutation(len(_SUBJECTS) * _TITLES_PER_TOPIC)[:num_items], _TITLES_PER_TOPIC)
    parts = np.unravel_index(number, (len(_OPENINGS), 5, len(_ACTIONS), len(_ENDINGS)))
    names = tuple(_SUBJECTS)
    titles = [
        f"{_OPENINGS[opening]} {_SUBJECTS[names[of]][subject]} {_ACTIONS[action]} {_ENDINGS[ending]} # {names[of]}"
        for of, opening, subject, action, ending in zip(topic, *parts, strict=True)
    ]
    return topic, titles


def _draw(generator: np.random.Generator, group: IntArray, cumulative: np.ndarray) -> IntArray:
    """One item for each entry of ``group``, from the group's weights, whose sums so far are ``cumulative [G, I]``."""
    uniform = generator.random(len(group)) * cumulative[group, -1]
    chosen = np.empty(len(group), dtype=np.int64)
    for number, sums in enumerate(cumulative):
        of_group = group == number
        chosen[of_group] = np.searchsorted(sums, uniform[of_group], side="right")
    return np.minimum(chosen, cumulative.shape[1] - 1)


def _interactions(generator: np.random.Generator, videos: IntArray, lengths: IntArray) -> pd.DataFrame:
    """The first ``lengths`` videos of each user, over about a year, hours to days apart."""
    inside = np.arange(videos.shape[1])[None, :] < lengths[:, None]
    start = generator.uniform(0, 365 * 24, size=(len(videos), 1))
    hours = start + generator.exponential(48, size=videos.shape).cumsum(axis=1)
    milliseconds = 1_640_000_000_000 + np.floor(hours * 3_600_000) + np.arange(videos.shape[1])
    owner = np.nonzero(inside)[0]
    user_ids, item_ids = (np.array(_ids(count), dtype=object) for count in (len(videos), int(videos.max()) + 1))
    return pd.DataFrame(
        {"user_id": user_ids[owner], "item_id": item_ids[videos[inside]], "timestamp": milliseconds[inside]}
    )


def _ids(count: int) -> list[str]:
    return [str(number) for number in range(1, count + 1)]
