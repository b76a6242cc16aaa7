"""A small data set as RecBole's atomic files: 12 users, 10 items with titles, 72 interactions."""

from __future__ import annotations

import random
from pathlib import Path

NOUNS = ("kettle", "lamp", "rope", "saw", "tent", "umbrella", "vase", "wheel", "xylophone", "yarn")
TITLES = {f"i{number}": f"Amber {noun}" for number, noun in enumerate(NOUNS)}
COMMON = [
    "data=atomic",
    "data.public_user_rate=0",
    "partition=random",
    "partition.num_clients=2",
    "trainer.cutoffs=[3]",
    "trainer.metric=ndcg_at_3",
]
Row = tuple[str, str, int, int]


def shop() -> list[Row]:
    """User, item, rating, time: 12 users with 6 of 10 items each, all times distinct, lines in random order."""
    generator = random.Random(3)
    rows = [
        (f"u{user:02d}", item, generator.randint(1, 5), 1_600_000_000 + 1000 * user + 100 * place)
        for user in range(12)
        for place, item in enumerate(generator.sample(sorted(TITLES), 6))
    ]
    generator.shuffle(rows)
    return rows


def inter(rows: list[Row], separator: str = "\t", rating: str = "rating") -> str:
    """The text of ``NAME.inter``."""
    lines = [f"user_id:token {{}} item_id:token {{}} {rating}:float {{}} timestamp:float".replace(" {} ", separator)]
    return "\n".join([*lines, *(separator.join(map(str, row)) for row in rows)]) + "\n"


def items(titles: dict[str, str] = TITLES, header: str = "item_id:token\ttitle:token_seq\tgenre:token_seq") -> str:
    """The text of ``NAME.item``."""
    lines = [f"{item}\t{title}\t{('kitchen', 'garden')[k % 2]}" for k, (item, title) in enumerate(titles.items())]
    return "\n".join([header, *lines]) + "\n"


def write(folder: Path, **files: str | bytes) -> Path:
    """Write ``shop.NAME`` for each; a name with two underscores has a dot there."""
    for name, text in files.items():
        path = folder / f"shop.{name.replace('__', '.')}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder
