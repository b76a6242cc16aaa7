"""Synthetic data sets: seeded, readable, with planted differences between groups of users.

They demonstrate the mechanism of federated training; results on them say nothing about real data. Shape letters:
U users, I items, G groups of users, N interactions.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray
from fellrec.data.schema import RawData
from fellrec.data.settings import MIN_LENGTH, SyntheticSettings

FloatArray = NDArray[np.float64]

_ADJECTIVES = (
    "Silent Golden Broken Hidden Crimson Distant Frozen Burning Gentle Hollow Velvet Restless Bitter Emerald Paper "
    "Lonely Electric Wild Sacred Midnight"
).split()
_NOUNS = (
    "Harbour Garden Mirror Orchard Station Lantern Compass Canyon Letter Sparrow Bridge Engine Island Winter Circus "
    "Ladder Empire Forest Signal River Tower Feather Market Shadow Anchor"
).split()
_FILM_TITLES = [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
_NOUNS_OF_GENRE = {
    "Drama": "Verdict Widow Funeral Hospital Divorce Orphan Marriage Farewell",
    "Comedy": "Prank Clown Butler Roommate Holiday Nuisance Babysitter Mischief",
    "Thriller": "Assassin Detective Hostage Conspiracy Heist Witness Alibi Spy",
    "Romance": "Kiss Bride Sweetheart Wedding Valentine Bouquet Lover Honeymoon",
    "Sci-Fi": "Robot Galaxy Spaceship Android Asteroid Alien Cyborg Planet",
    "Western": "Sheriff Cowboy Saloon Outlaw Ranch Rodeo Gunslinger Stagecoach",
    "Horror": "Vampire Zombie Ghost Curse Crypt Werewolf Demon Haunting",
    "Musical": "Melody Orchestra Singer Opera Tango Chorus Ballet Jazz",
}
_GENRES = ("Drama", "Comedy", "Thriller", "Romance", "Sci-Fi", "Western", "Horror", "Musical")

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
_TITLE_PARTS = (len(_OPENINGS), 5, len(_ACTIONS), len(_ENDINGS))
_VIDEOS_PER_TOPIC = int(np.prod(_TITLE_PARTS))


class _Films:
    """Few films with genres and short titles; every user knows all of them."""

    user_id, first_number = "user{:04d}", 0

    def topics(self, generator: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
        """``[I]``: what `items` needs to know of each item, and its topic."""
        genre = generator.integers(len(_GENRES), size=count)
        return genre, genre

    def weights(self, taste: FloatArray, place: IntArray) -> FloatArray:
        """``[G, I]``: from the groups' taste for each item, and the items' places by popularity."""
        popularity = 1.0 / (1.0 + place) ** 0.8
        weights = popularity[None, :] * taste + 0.02 * popularity[None, :]
        return weights / weights.sum(axis=1, keepdims=True)

    def lengths(self, generator: np.random.Generator, reader: SyntheticReader, num_items: int) -> IntArray:
        """``[U]`` interactions of each user."""
        lengths = generator.poisson(reader.mean_length, size=reader.num_users)
        return np.clip(lengths, MIN_LENGTH, int(2 * reader.mean_length))

    def walk(
        self,
        generator: np.random.Generator,
        reader: SyntheticReader,
        group: IntArray,
        weights: FloatArray,
        successors: IntArray,
        num_steps: int,
    ) -> IntArray:
        """``[U, num_steps]`` distinct items of each user. All take a step at a time; what was seen has weight 0."""
        everyone, num_items = np.arange(reader.num_users), weights.shape[1]
        seen = np.zeros((reader.num_users, num_items), dtype=bool)
        films = np.full((reader.num_users, num_steps), -1, dtype=np.int64)
        for step in range(num_steps):
            cumulative = (weights[group] * ~seen).cumsum(axis=1)
            draw = generator.random(reader.num_users)[:, None] * cumulative[:, -1:]
            chosen = np.minimum((draw > cumulative).sum(axis=1), num_items - 1)
            if step > 0:
                habit = successors[group, films[:, step - 1]]
                follows = (generator.random(reader.num_users) < reader.habit_rate) & ~seen[everyone, habit]
                chosen = np.where(follows, habit, chosen)
            films[:, step] = chosen
            seen[everyone, chosen] = True
        return films

    def items(self, generator: np.random.Generator, genre: IntArray) -> pd.DataFrame:
        """The catalogue."""
        titles = self.titles(generator, genre)
        item_ids = _ids("film{:03d}", len(genre), 0)
        return pd.DataFrame({"item_id": item_ids, "title": titles, "genre": [_GENRES[index] for index in genre]})

    def titles(self, generator: np.random.Generator, genre: IntArray) -> list[str]:
        """Distinct titles, which have nothing to do with the genre."""
        return [_FILM_TITLES[index] for index in generator.permutation(len(_FILM_TITLES))[: len(genre)]]

    def times(self, generator: np.random.Generator, inside: NDArray[np.bool_]) -> FloatArray:
        """Seconds, about an hour apart, where ``[U, num_steps]`` is true."""
        owner, position = np.nonzero(inside)
        starts = generator.uniform(0, 1e6, size=len(inside))
        steps = generator.exponential(3600, size=len(owner)) + 1.0
        return np.round(starts[owner] + pd.Series(steps).groupby(owner).cumsum().to_numpy() + position, 3)


class _GenreFilms(_Films):
    """As films, and a language model knows something of their titles: the noun fits the genre."""

    def topics(self, generator: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
        """As many films of each genre as of any other, or one more."""
        genre = generator.permutation(np.arange(count) % len(_GENRES))
        return genre, genre

    def titles(self, generator: np.random.Generator, genre: IntArray) -> list[str]:
        """Distinct titles with a noun of the genre."""
        found = [""] * len(genre)
        for number, name in enumerate(_GENRES):
            pairs = [f"The {adjective} {noun}" for noun in _NOUNS_OF_GENRE[name].split() for adjective in _ADJECTIVES]
            for item, index in zip(np.flatnonzero(genre == number), generator.permutation(len(pairs)), strict=False):
                found[item] = pairs[index]
        return found


class _Videos:
    """Many videos in the shape of MicroLens, at any size; the methods are those of `_Films`."""

    user_id, first_number = "{}", 1

    def topics(self, generator: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
        """Number and topic of each video; a title's number divided by the videos of a topic is the topic."""
        numbers = generator.permutation(len(_SUBJECTS) * _VIDEOS_PER_TOPIC)[:count]
        return numbers, numbers // _VIDEOS_PER_TOPIC

    def weights(self, taste: FloatArray, place: IntArray) -> FloatArray:
        """Popularity falls with the place of a video, and taste multiplies it."""
        return 1.0 / (10.0 + place) * (taste + 0.02)

    def lengths(self, generator: np.random.Generator, reader: SyntheticReader, num_items: int) -> IntArray:
        """``MIN_LENGTH`` and a geometric number more, at most half of the catalogue."""
        more = generator.geometric(1 / (1 + reader.mean_length - MIN_LENGTH), size=reader.num_users) - 1
        return np.minimum(MIN_LENGTH + more, num_items // 2)

    def walk(
        self,
        generator: np.random.Generator,
        reader: SyntheticReader,
        group: IntArray,
        weights: FloatArray,
        successors: IntArray,
        num_steps: int,
    ) -> IntArray:
        """All users take a step at a time; one who would watch a video twice draws again, and not by habit."""
        cumulative = weights.cumsum(axis=1)
        videos = np.full((reader.num_users, num_steps), -1, dtype=np.int64)
        for step in range(num_steps):
            left, may_follow = np.arange(reader.num_users), step > 0
            while len(left):
                kind = generator.random(len(left))
                chosen = _draw(generator, group[left], cumulative)
                anything = generator.integers(weights.shape[1], size=len(left))
                chosen = np.where(kind >= 1 - reader.random_rate, anything, chosen)
                if may_follow:
                    habit = successors[group[left], videos[left, step - 1]]
                    chosen = np.where(kind < reader.habit_rate, habit, chosen)
                again = (videos[left, :step] == chosen[:, None]).any(axis=1)
                videos[left[~again], step] = chosen[~again]
                left, may_follow = left[again], False
        return videos

    def items(self, generator: np.random.Generator, numbers: IntArray) -> pd.DataFrame:
        """Distinct titles; the topic shows in the subject and the hashtag."""
        names = [tuple(_SUBJECTS)[topic] for topic in numbers // _VIDEOS_PER_TOPIC]
        parts = np.unravel_index(numbers % _VIDEOS_PER_TOPIC, _TITLE_PARTS)
        titles = [
            f"{_OPENINGS[opening]} {_SUBJECTS[name][subject]} {_ACTIONS[action]} {_ENDINGS[ending]} # {name}"
            for name, opening, subject, action, ending in zip(names, *parts, strict=True)
        ]
        return pd.DataFrame({"item_id": _ids("{}", len(numbers), 1), "title": titles})

    def times(self, generator: np.random.Generator, inside: NDArray[np.bool_]) -> FloatArray:
        """Milliseconds: over about a year, hours to days apart."""
        start = generator.uniform(0, 365 * 24, size=(len(inside), 1))
        hours = start + generator.exponential(48, size=inside.shape).cumsum(axis=1)
        return (1_640_000_000_000 + np.floor(hours * 3_600_000) + np.arange(inside.shape[1]))[inside]


_PRESETS: dict[str, _Films | _Videos] = {
    "films": _Films(),
    "genre_films": _GenreFilms(),
    "micro_lens_shaped": _Videos(),
}


class SyntheticReader(SyntheticSettings):
    """Users in groups whose tastes differ and whose habits partly contradict each other.

    A user picks the next item by habit (the group's successor of the last item), by taste (a topic that the group
    likes, popular items first), or at random. Some of the habits are common to all groups; the others send the same
    item to different successors in different groups, so no single model can serve all groups perfectly.

    The preset ``films`` has a small catalogue with genres, and times in seconds; the titles of ``genre_films`` have a
    noun that fits the genre, such as The Silent Vampire, so that a language model knows something of them.
    ``micro_lens_shaped`` scales to MicroLens's size and has its shape: more users the shorter the history, few videos
    that many watch and many that few do, titles of a dozen words with a hashtag and no other attributes, ids from 1,
    times in milliseconds. The configurations ``data=synthetic`` and ``data=micro_lens_shaped`` have settings that suit
    them.
    """

    def read(self) -> RawData:
        """Generate the data."""
        num_items = self.resolved_num_items
        preset, generator = _PRESETS[self.preset], np.random.default_rng(self.seed)
        numbers, topic = preset.topics(generator, num_items)
        place = generator.permutation(num_items)
        sizes = 0.7 ** np.arange(self.num_groups)
        group = generator.choice(self.num_groups, size=self.num_users, p=sizes / sizes.sum())
        taste = generator.dirichlet([0.25] * len(_GENRES), size=self.num_groups)
        weights = preset.weights(taste[:, topic], place)
        successors = self._successors(generator, num_items)
        lengths = preset.lengths(generator, self, num_items)
        walks = preset.walk(generator, self, group, weights, successors, int(lengths.max()))
        inside = np.arange(walks.shape[1])[None, :] < lengths[:, None]
        items = preset.items(generator, numbers)
        user_ids = _ids(preset.user_id, self.num_users, preset.first_number)
        users = pd.DataFrame({"user_id": user_ids, "group": [f"group{number}" for number in group]})
        interactions = pd.DataFrame(
            {
                "user_id": users["user_id"].to_numpy()[np.nonzero(inside)[0]],
                "item_id": items["item_id"].to_numpy()[walks[inside]],
                "timestamp": preset.times(generator, inside),
            }
        )
        return RawData(interactions, items, users)

    def fingerprint(self) -> str:
        """All settings."""
        return f"synthetic-2:{sorted(asdict(self).items())}"

    def _successors(self, generator: np.random.Generator, num_items: int) -> IntArray:
        """``[G, I]``: the item that each group prefers after each item; permutations."""
        shared = generator.permutation(num_items)
        own = np.flatnonzero(generator.random(num_items) >= self.shared_rate)
        successors = np.tile(shared, (self.num_groups, 1))
        for group in range(self.num_groups):
            successors[group, own] = shared[generator.permutation(own)]
        return successors


def _ids(template: str, count: int, first: int) -> list[str]:
    return [template.format(number) for number in range(first, first + count)]


def _draw(generator: np.random.Generator, group: IntArray, cumulative: FloatArray) -> IntArray:
    """One item for each entry of ``group``, from the group's weights with cumulative sums ``[G, I]``."""
    uniform = generator.random(len(group)) * cumulative[group, -1]
    chosen = np.empty(len(group), dtype=np.int64)
    for number, sums in enumerate(cumulative):
        of_group = group == number
        chosen[of_group] = np.searchsorted(sums, uniform[of_group], side="right")
    return np.minimum(chosen, cumulative.shape[1] - 1)
