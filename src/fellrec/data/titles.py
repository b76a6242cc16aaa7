"""Items by their titles, as people type them."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz import fuzz, process, utils

from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError, DataError

_SUGGESTED, _CANDIDATES, _LEAST_SCORE = 3, 50, 60.0
_MOST_UNKNOWN = 10


def items_of(titles: Sequence[str], catalogue: Catalogue) -> list[int]:
    """The items that titles name; case and punctuation do not count, and of items with one title the first is taken.

    An item id is accepted instead of a title; if a text is both, it is the title.

    Args:
        titles: As a user typed them.
        catalogue: The items.

    Raises:
        DataError: If a title is not in the catalogue; names the most similar ones.
    """
    exact = {title: item for item, title in reversed(list(enumerate(catalogue.titles)))}
    plain = {utils.default_process(title): item for title, item in reversed(exact.items())}
    by_id = {item_id: item for item, item_id in enumerate(catalogue.item_ids)}
    found = [exact.get(title, plain.get(utils.default_process(title), by_id.get(title))) for title in titles]
    unknown = [title for title, item in zip(titles, found, strict=True) if item is None]
    if unknown:
        raise DataError("\n".join(_unknown(title, catalogue) for title in unknown[:_MOST_UNKNOWN]))
    return [item for item in found if item is not None]


def check_client(client: int, num_clients: int) -> None:
    """Refuse a client that does not exist.

    Raises:
        ConfigError: Saying which there are.
    """
    if not 0 <= client < num_clients:
        raise ConfigError(f"client {client} is not allowed: the run has clients 0 to {num_clients - 1}")


def _unknown(title: str, catalogue: Catalogue) -> str:
    choices = list(dict.fromkeys(catalogue.titles))
    similar = process.extract(
        title,
        choices,
        scorer=fuzz.WRatio,
        processor=utils.default_process,
        limit=_CANDIDATES,
        score_cutoff=_LEAST_SCORE,
    )
    # WRatio finds parts of a title and scores many of them the same; of these the whole title decides.
    nearest = sorted(
        (name for name, *_ in similar), key=lambda name: -fuzz.QRatio(title, name, processor=utils.default_process)
    )
    names = ", ".join(map(repr, nearest[:_SUGGESTED]))
    if names:
        return f"no item is called {title!r}; did you mean {names}?"
    some = ", ".join(map(repr, choices[:_SUGGESTED]))
    return f"no item is called {title!r}, and no title is similar; the catalogue begins with {some}"
