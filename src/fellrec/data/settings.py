"""Settings of the data: ``data`` with its readers, ``partition``, ``holdout``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fellrec.functional.ranges import (
    Allowed,
    Count,
    Line,
    Name,
    Natural,
    Positive,
    Rate,
    RateBelow1,
    Seed,
    check,
    line,
    number,
    refuse,
    whole,
)

MICRO_LENS_ITEMS_PER_USER = 19_738 / 100_000
"""From MicroLens-100k's published counts."""
MIN_LENGTH = 5
"""Fewest interactions of a user in generated data, with every preset."""
LEAST_ITEMS, MOST_ITEMS = 20, {"films": 500, "genre_films": 1280, "micro_lens_shaped": 81_920}
"""Limits of ``num_items`` for each preset: the number of distinct titles."""
MOST_USERS, MOST_GROUPS = 10_000_000, 10_000
"""Limits of what fits into memory."""


@dataclass(frozen=True)
class DataSettings:
    """Settings of the preparation, beside reader, holdout and partition; and what is known of the data."""

    name: Name | None
    """Name of the data set, for tables, files and MLflow; null: that of its file or folder."""
    root: Line | None
    """Folder of the data set's files; null for data that are generated, or whose files are given one by one."""
    domain: str = "product"
    """Wording of prompts: movie, game, product or video."""
    core: Natural = 0
    """Minimum of the k-core filter; 0 keeps everything."""
    max_history: Count = 10
    """Longest history in items that a model receives."""
    max_train_samples: Count | None = None
    """Few-shot: number of training targets, of all clients together, to sample; null keeps all."""
    max_users: Count | None = None
    """Number of users to sample after the k-core filter; null keeps all."""
    public_user_rate: RateBelow1 = 0.2
    """Fraction of public users, which belong to no client and are not evaluated."""
    seed: Seed = 0
    """Seed of the samples, the same for every seed of a comparison."""
    on_empty_title: Literal["error", "item_id", "drop"] = "error"
    """Items without a title, or without a line in the item file: error refuses them, item_id uses "item <id>" as their
    title, drop leaves their interactions out."""
    on_missing_time: Literal["error", "drop", "file_order"] = "error"
    """Interactions without a timestamp: error refuses them, drop leaves them out, file_order takes the order of the
    file instead of the times of all interactions."""
    ties: Literal["file", "shuffle"] = "file"
    """Order of a user's interactions with equal times: that of the file, or a random one that depends on ``seed``,
    user and item only."""
    min_rating: float | None = None
    """Keeps interactions with a rating or label of at least this, such as 4 or 1; null keeps all."""
    on_missing_rating: Literal["error", "drop"] = "error"
    """Interactions without a rating, if ``min_rating`` is given: error refuses them, drop leaves them out."""
    min_user_interactions: Natural = 0
    """Users with fewer interactions are left out, after the k-core filter; 0 keeps everything."""
    repeats: Literal["last", "first", "keep"] = "last"
    """Repeated interactions of a user with an item: last keeps the last one, first the first; keep keeps all, and seen
    items are then ranked too."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Published counts that ``fellrec prepare`` checks."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data")


MEMBER = "member"
"""``data.domain`` of a federation whose prompts have each member's own wording."""


def _are_members(members: Any) -> bool:
    texts = [*members, *members.values()] if isinstance(members, Mapping) else members
    is_listed = isinstance(members, (list, tuple, Mapping)) and len(members) > 0
    return is_listed and len(set(members)) == len(members) and all(isinstance(text, str) for text in texts)


Members = Annotated[
    Any,
    Allowed(
        _are_members,
        "a list of different choices of data, such as [ml_1m,games], or names with choices, such as "
        "{films: ml_1m, books: atomic}",
    ),
]


@dataclass(frozen=True)
class FederationSettings:
    """Several data sets, each the data of one client or of several, which rank the items of their own data set only."""

    members: Members
    """The data sets: choices of data, such as [ml_1m,games], or names with choices, such as {films: ml_1m, books:
    atomic}. data.member.NAME has the settings of each, such as data.member.games.max_users=500; partition and holdout
    are for all, data.member.NAME.partition and data.member.NAME.holdout for one."""
    name: Name = "federation"
    """Name of the federation, for tables and files."""
    domain: str = MEMBER
    """Wording of prompts: member, that of each member's own domain; or movie, game, product or video for all."""
    max_history: Count = 10
    """Longest history in items that a model receives, in all members."""
    member: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the members by name, each as in a run on its data alone."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data")


Root = Annotated[str, line(text="the directory of the files, given as data.root")]


@dataclass(frozen=True)
class FilesSettings:
    """A reader of published files."""

    root: Root
    """Folder of the files."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data.reader")


@dataclass(frozen=True)
class AtomicSettings:
    """A reader of RecBole's atomic files."""

    root: Root
    """Folder of the files."""
    name: Line | None = None
    """Stem of the files; null takes the only .inter file of the folder, or the only .train.inter, .valid.inter and
    .test.inter."""
    title_column: Line | None = None
    """Column of the item file that holds the title; null tries title, movie_title, item_name and name."""
    rating_column: Line | None = None
    """Column of the interactions for ``data.min_rating``; null tries rating and label."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data.reader")


MeanLength = Annotated[float, number(lambda x: x >= MIN_LENGTH + 1, f"a number of at least {MIN_LENGTH + 1}")]


@dataclass(frozen=True)
class SyntheticSettings:
    """Generated data: users in groups with tastes and habits of their own."""

    preset: Literal["films", "genre_films", "micro_lens_shaped"] = "films"
    """films: a small catalogue with genres. genre_films: the same with titles that fit the genre, for language models.
    micro_lens_shaped: scales to MicroLens's size and has its shape."""
    num_users: Annotated[int, whole(1, MOST_USERS)] = 1000
    """U; 100000 is MicroLens's size."""
    num_items: Annotated[int, whole(LEAST_ITEMS)] | None = 400
    """I, at most 500 films, 1280 genre_films or 81920 videos; null: in MicroLens's proportion to the users."""
    num_groups: Annotated[int, whole(1, MOST_GROUPS)] = 5
    """G, a column of the users; sizes fall geometrically."""
    mean_length: MeanLength = 24
    """Mean number of interactions of a user, at most half of the items; MicroLens's is 7.19405."""
    habit_rate: Rate = 0.6
    """Fraction of steps that follow the group's habit."""
    random_rate: Rate = 0.0
    """Fraction of steps that are random; must be 0 for films and genre_films."""
    shared_rate: Rate = 0.5
    """Fraction of items whose habit is the same in all groups."""
    seed: Seed = 0
    """Of all random choices."""

    def __post_init__(self) -> None:
        """Check all ranges, and those that depend on the preset or on other settings."""
        check(self, "data.reader")
        refuse(self._wrong_items, self._wrong_length, self._wrong_rates)

    @property
    def resolved_num_items(self) -> int:
        """I, also if it follows from the number of users."""
        return round(MICRO_LENS_ITEMS_PER_USER * self.num_users) if self.num_items is None else self.num_items

    @property
    def _wrong_items(self) -> str | None:
        num_items, most = self.resolved_num_items, MOST_ITEMS[self.preset]
        if LEAST_ITEMS <= num_items <= most:
            return None
        derived = f" from data.reader.num_users={self.num_users}" if self.num_items is None else ""
        return f"data.reader.num_items={num_items}{derived} must be from {LEAST_ITEMS} to {most}"

    @property
    def _wrong_length(self) -> str | None:
        num_items = self.resolved_num_items
        text = f"data.reader.mean_length={self.mean_length} must be at most half of the {num_items} items"
        return text if 2 * self.mean_length > num_items else None

    @property
    def _wrong_rates(self) -> str | None:
        if self.preset != "micro_lens_shaped" and self.random_rate > 0:
            return f"data.reader.random_rate={self.random_rate} must be 0 for data.reader.preset={self.preset}"
        if self.habit_rate + self.random_rate <= 1:
            return None
        return (
            f"data.reader.habit_rate={self.habit_rate} and data.reader.random_rate={self.random_rate} "
            "must be at most 1 together"
        )


@dataclass(frozen=True)
class KMeansSettings:
    """k-means on factors of the user-item matrix (METHOD §2)."""

    num_clients: Count = 5
    """C."""
    num_factors: Count = 32
    """Factors of the truncated SVD."""
    seed: Seed = 0
    """Seed of SVD and k-means."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class RandomSettings:
    """Random partition into clients of nearly equal size."""

    num_clients: Count = 5
    """C."""
    seed: Seed = 0
    """Seed of the shuffle."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class DirichletSettings:
    """The users of each favourite genre are distributed over clients by a Dirichlet draw."""

    num_clients: Count = 5
    """C."""
    concentration: Positive = 0.3
    """Concentration of the Dirichlet distribution; smaller concentrations give less similar clients."""
    seed: Seed = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class AttributeSettings:
    """One client per value of a user attribute."""

    column: Line
    """Name of a user attribute, such as gender or occupation."""
    on_missing: Literal["error", "client"] = "error"
    """Users without a value (empty, NaN, NULL): error refuses them, client makes them a client of their own."""
    num_clients: Count | None = None
    """Not used; the attribute determines the number of clients."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class PerUserSettings:
    """One client per user."""

    num_clients: Count | None = None
    """Not used; every user is a client."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class LeaveOneOutSettings:
    """Each user's last interaction is the test target, the one before it the validation target."""

    min_length: Annotated[int, whole(3)] = 3
    """Shortest history with a validation and a test target; all interactions of users with a shorter one are for
    training."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "holdout")


@dataclass(frozen=True)
class GivenSplitSettings:
    """The split of the files ``NAME.train.inter``, ``NAME.valid.inter`` and ``NAME.test.inter``."""


@dataclass(frozen=True)
class GlobalTimeSettings:
    """The latest interactions of all users are for test, those before for validation (METHOD §5)."""

    valid_rate: Positive = 0.1
    """Fraction of the interactions for validation."""
    test_rate: Positive = 0.1
    """Fraction of the interactions for test."""

    def __post_init__(self) -> None:
        """Check all ranges, and that something is left for training."""
        check(self, "holdout")
        text = f"holdout.valid_rate={self.valid_rate} and holdout.test_rate={self.test_rate} must be below 1 together"
        refuse(text if self.valid_rate + self.test_rate >= 1 else None)
