"""Settings of the data: ``data`` with its readers, ``partition``, ``holdout``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fellrec.functional.ranges import Count, Natural, Positive, Rate, RateBelow1, check, refuse, whole

MICRO_LENS_USERS, MICRO_LENS_ITEMS = 100_000, 19_738
"""Published counts of MicroLens-100k."""


@dataclass(frozen=True)
class DataSettings:
    """What shapes the data beside reader, holdout and partition; and what is known of them."""

    name: str
    """Of the data set, for tables."""
    root: str | None
    """Folder of the data set's files; null for data that are generated."""
    domain: str = "product"
    """Wording of prompts: movie, game, product or video."""
    core: Natural = 0
    """k-core filter; 0 keeps everything."""
    max_history: Count = 10
    """Longest history in items that a model sees."""
    max_train_samples: Count | None = None
    """Few-shot: number of (history, target) pairs of all clients together that are kept, at random; null: all."""
    max_users: Count | None = None
    """Number of users that are kept, at random, after the core filter; null: all."""
    public_user_rate: RateBelow1 = 0.2
    """Fraction of the users who are public: in no client and no evaluation."""
    seed: int = 0
    """Of these random choices, the same for every seed of a comparison."""
    on_empty_title: Literal["error", "item_id"] = "error"
    """Items without a title: error refuses them, item_id calls them "item <id>"."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Published counts that ``fellrec prepare`` checks."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data")


@dataclass(frozen=True)
class FilesSettings:
    """A reader of published files."""

    root: str
    """Folder of the files."""


@dataclass(frozen=True)
class AtomicSettings:
    """A reader of RecBole's atomic files."""

    root: str
    """Folder of the files."""
    name: str | None = None
    """Stem of the files; null: the only .inter file of the folder."""
    title_column: str | None = None
    """Column of the item file that holds the title; null: title, movie_title, item_name or name."""


@dataclass(frozen=True)
class SyntheticSettings:
    """The embedded data set: films with genres, and groups of users with tastes and habits."""

    num_users: Count = 1000
    """U."""
    num_items: Annotated[int, whole(20, 500)] = 400
    """I; there are 500 titles."""
    num_groups: Count = 5
    """User groups; sizes fall geometrically."""
    mean_length: Annotated[int, whole(6)] = 24
    """Mean number of interactions of a user, at most half of ``num_items``."""
    habit_rate: Rate = 0.6
    """Fraction of steps that follow the group's habit."""
    shared_rate: Rate = 0.5
    """Fraction of films whose habit is the same in all groups."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        """Check all ranges, and that a user can see enough distinct films."""
        check(self, "data.reader")
        text = (
            f"data.reader.mean_length={self.mean_length} must be at most half of data.reader.num_items={self.num_items}"
        )
        refuse(text if 2 * self.mean_length > self.num_items else None)


@dataclass(frozen=True)
class MicroLensShapedSettings:
    """Generated data in the shape of MicroLens-100k."""

    num_users: Count = 3000
    """U; 100000 is MicroLens's size."""
    num_items: Annotated[int, whole(20, 81_920)] | None = None
    """I; null: in MicroLens's proportion to the users."""
    num_groups: Count = 5
    """User groups, a column of the users; sizes fall geometrically."""
    habit_rate: Rate = 0.35
    """Fraction of steps that follow the group's habit."""
    random_rate: Rate = 0.15
    """Fraction of steps that follow nothing."""
    shared_rate: Rate = 0.5
    """Fraction of videos whose habit is the same in all groups."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        """Check all ranges, the number of items that follows from that of users, and the sum of two fractions."""
        check(self, "data.reader")
        refuse(self._wrong_rates, self._wrong_items)

    @property
    def items(self) -> int:
        """I, also where it is left to the number of users."""
        per_user = MICRO_LENS_ITEMS / MICRO_LENS_USERS
        return round(per_user * self.num_users) if self.num_items is None else self.num_items

    @property
    def _wrong_rates(self) -> str | None:
        if self.habit_rate + self.random_rate <= 1:
            return None
        return (
            f"data.reader.habit_rate={self.habit_rate} and data.reader.random_rate={self.random_rate} "
            "must be at most 1 together"
        )

    @property
    def _wrong_items(self) -> str | None:
        if 20 <= self.items <= 81_920:
            return None
        return f"data.reader.num_users={self.num_users} makes {self.items} items; allowed are 20 to 81920"


@dataclass(frozen=True)
class KMeansSettings:
    """k-means on factors of the user-item matrix (METHOD §2)."""

    num_clients: Count = 5
    """C."""
    num_factors: Count = 32
    """Factors of the truncated SVD."""
    seed: int = 0
    """Of SVD and k-means."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class RandomSettings:
    """Users at random, clients of nearly equal size."""

    num_clients: Count = 5
    """C."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class DirichletSettings:
    """Users who prefer the same genre go to clients in Dirichlet proportions."""

    num_clients: Count = 5
    """C."""
    concentration: Positive = 0.3
    """Of the Dirichlet distribution; the smaller, the less alike are the clients."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class AttributeSettings:
    """One client per value of a user attribute."""

    column: str
    """A column of the users, such as gender or occupation."""
    num_clients: Count | None = None
    """Not used: the data determine it."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class PerUserSettings:
    """One client per user."""

    num_clients: Count | None = None
    """Not used: the data determine it."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "partition")


@dataclass(frozen=True)
class LeaveOneOutSettings:
    """Each user's last interaction is for test, the one before for validation."""

    min_length: Annotated[int, whole(3)] = 3
    """Shortest history that is evaluated: train, validation and test; users with a shorter one train only."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "holdout")


@dataclass(frozen=True)
class GlobalTimeSettings:
    """The last interactions of all users together are for test, those before for validation (METHOD §5)."""

    valid_rate: Positive = 0.1
    """Fraction of the interactions for validation."""
    test_rate: Positive = 0.1
    """Fraction of the interactions for test."""

    def __post_init__(self) -> None:
        """Check all ranges, and that something is left for training."""
        check(self, "holdout")
        text = f"holdout.valid_rate={self.valid_rate} and holdout.test_rate={self.test_rate} must be below 1 together"
        refuse(text if self.valid_rate + self.test_rate >= 1 else None)
