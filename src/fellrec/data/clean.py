"""Validation of raw data, and the settings that say what to do about gaps, ratings and repeated interactions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from fellrec.data.schema import Locate, RawData
from fellrec.data.settings import DataSettings
from fellrec.errors import DataError, shorten

MAX_TITLE = 10_000
"""Longest title in characters; training a tokenizer on a longer one takes seconds to hours."""

_EARLIEST, _FAR = 1e8, 100
"""Smallest usual timestamp, in seconds since 1970, at which one that is ``_FAR`` times smaller or larger is unusual."""
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\u00ad]*")
"""Spaces, and signs that nothing is seen of."""


@dataclass(frozen=True)
class Cleaned:
    """Valid data.

    Attributes:
        raw: The data after all settings were applied.
        counts: What was read and what was left out, by name.
        notes: What a user should know of it, one sentence each.
    """

    raw: RawData
    counts: Mapping[str, int]
    notes: tuple[str, ...]


def clean(raw: RawData, settings: DataSettings) -> Cleaned:
    """Validate raw data and apply the settings that say what to do about gaps, ratings and repeated interactions.

    Equal lines of the item or user file count once.

    Raises:
        DataError: If the data are invalid; lists all problems with counts and the first offending line.
    """
    raw = replace(
        raw,
        interactions=raw.interactions.reset_index(drop=True),
        items=_distinct_rows(raw.items),
        users=_distinct_rows(raw.users),
    )
    raw.items["title"] = raw.items["title"].fillna("").str.replace(r"[\r\n]+", " ", regex=True)
    if found := [problem for problem in _problems(raw, settings) if problem]:
        raise DataError("invalid data: " + "; ".join(found))
    num_in_files = len(raw.interactions)
    raw, about_titles = _with_titles(raw, settings)
    raw, about_times = _with_times(raw, settings)
    raw, about_missing = _with_ratings(raw, settings)
    counts = {"interactions_in_files": num_in_files}
    counts |= {f"{name}_as_read": count for name, count in sizes(_distinct(raw.interactions, settings)).items()}
    chosen = _rated(raw.interactions, settings.min_rating)
    kept = _distinct(chosen, settings)
    if settings.min_rating is not None:
        counts["below_min_rating"] = len(raw.interactions) - len(chosen)
    counts["repeats_dropped"] = len(chosen) - len(kept)
    notes = (
        about_titles,
        about_times,
        about_missing,
        _about_ratings(raw, settings),
        _about_repeats(chosen, settings),
        _about_units(raw),
        *raw.notes,
    )
    return Cleaned(replace(raw, interactions=kept), counts, tuple(filter(None, notes)))


def sizes(interactions: pd.DataFrame) -> dict[str, int]:
    """Number of users, items and interactions."""
    return {
        "users": int(interactions["user_id"].nunique()),
        "items": int(interactions["item_id"].nunique()),
        "interactions": len(interactions),
    }


def one_of_each(interactions: pd.DataFrame, keep: Literal["first", "last"]) -> pd.DataFrame:
    """The first or last interaction of each user and item by time, in the given order."""
    by = ["stage", "timestamp"] if "stage" in interactions else ["timestamp"]
    ordered = interactions.sort_values(by, kind="stable")
    return ordered.drop_duplicates(["user_id", "item_id"], keep=keep).sort_index()


def _distinct(interactions: pd.DataFrame, settings: DataSettings) -> pd.DataFrame:
    return interactions if settings.repeats == "keep" else one_of_each(interactions, settings.repeats)


def _problems(raw: RawData, settings: DataSettings) -> Iterator[str]:
    yield "the interactions are empty" if raw.interactions.empty else ""
    yield from _item_problems(raw, settings)
    yield from _time_problems(raw, settings)
    yield from _rating_problems(raw, settings)
    yield from _user_problems(raw)
    yield _in_two_spellings(raw.interactions["user_id"], raw.users["user_id"], "user")
    yield _in_two_spellings(raw.interactions["item_id"], raw.items["item_id"], "item")


def _item_problems(raw: RawData, settings: DataSettings) -> Iterator[str]:
    items = raw.items
    is_long = items["title"].str.len() > MAX_TITLE
    yield _first(is_long, f"items have a title of more than {MAX_TITLE:,} characters", raw.where_item)
    yield _first(_is_blank(items["item_id"]), "item ids are empty", raw.where_item)
    yield _first(items["item_id"].duplicated(), "item ids are duplicates", raw.where_item)
    if settings.on_empty_title != "error":
        return
    hint = "(set data.on_empty_title=item_id to allow it)"
    yield _first(_is_blank(items["title"]), f"items have an empty title {hint}", raw.where_item)
    unknown = ~raw.interactions["item_id"].isin(items["item_id"])
    if unknown.any() and raw.no_items:
        yield f"{raw.no_items}, so items have no titles {hint}"
    else:
        example = _example(raw.interactions["item_id"], unknown, items["item_id"], "item")
        what = f"interactions have an item that is not in the catalogue{example} {hint}"
        yield _first(unknown, what, raw.where_interaction)


def _time_problems(raw: RawData, settings: DataSettings) -> Iterator[str]:
    times = raw.interactions["timestamp"]
    yield _first(np.isinf(times), "timestamps are not finite numbers", raw.where_interaction)
    if settings.on_missing_time != "error" or not times.isna().any():
        return
    hint = "(set data.on_missing_time=file_order or drop to allow it)"
    if raw.no_times:
        yield f"{raw.no_times} {hint}"
    else:
        yield _first(times.isna(), f"interactions have no timestamp {hint}", raw.where_interaction)


def _rating_problems(raw: RawData, settings: DataSettings) -> Iterator[str]:
    if settings.min_rating is None:
        return
    if "rating" not in raw.interactions:
        yield f"data.min_rating={settings.min_rating:g} needs a column with ratings or labels"
    elif settings.on_missing_rating == "error":
        is_missing = raw.interactions["rating"].isna()
        hint = "(set data.on_missing_rating=drop to leave them out)"
        yield _first(is_missing, f"interactions have no number as {raw.rating_name} {hint}", raw.where_interaction)


def _user_problems(raw: RawData) -> Iterator[str]:
    names = raw.users["user_id"]
    again = names.duplicated()
    first = shorten(repr(names[again].iloc[0])) if again.any() else ""
    yield _first(again, f"users are listed again with other values (user {first})", raw.where_user)
    empty = names[_is_blank(names)]
    yield _first(raw.interactions["user_id"].isin(empty), "interactions have an empty user id", raw.where_interaction)
    unknown = ~raw.interactions["user_id"].isin(names)
    example = _example(raw.interactions["user_id"], unknown, names, "user")
    yield _first(unknown, f"interactions have a user that is not in the user file{example}", raw.where_interaction)


def _example(ids: pd.Series, is_unknown: pd.Series, known: pd.Series, kind: str) -> str:
    """The first id that is not known, and the one that it is probably meant to be."""
    if not is_unknown.any():
        return ""
    value = str(ids[is_unknown].iloc[0])
    known_as = {_bare(str(other)): str(other) for other in known}
    meant = known_as.get(_bare(value))
    return f" ({kind} {shorten(repr(value), 80)}{f'; it has {shorten(repr(meant), 80)}' if meant is not None else ''})"


def _bare(name: str) -> str:
    """An id without what programs add to or remove from numbers, and without regard to case."""
    text = name.strip().casefold()
    whole = text.removesuffix(".0")
    return whole.lstrip("0") or whole


def _in_two_spellings(used: pd.Series, listed: pd.Series, kind: str) -> str:
    """That ids differ in spaces around them only, so that one user or item would be two."""
    names = pd.unique(pd.concat([used, listed], ignore_index=True))
    spaced = [name for name in names if name != name.strip()]
    twice = sorted({name.strip() for name in spaced} & ({*names} - {*spaced}))
    if not twice:
        return ""
    return (
        f"{len(twice)} {kind} ids are there with and without spaces around them, such as {shorten(repr(twice[0]), 80)}"
    )


def _with_titles(raw: RawData, settings: DataSettings) -> tuple[RawData, str]:
    """Titles for items without one, or the data without these items; and a note."""
    items, item_id = raw.items, raw.interactions["item_id"]
    if settings.on_empty_title == "item_id":
        absent = pd.DataFrame({"item_id": sorted(set(item_id) - set(items["item_id"]))}, dtype=str)
        items = pd.concat([items, absent], ignore_index=True).fillna("")
        empty = _is_blank(items["title"])
        items.loc[empty, "title"] = "item " + items.loc[empty, "item_id"]
        note = f'{len(absent):,} items have no line in the item file and are called "item <id>"' if len(absent) else ""
        return replace(raw, items=items), note
    if settings.on_empty_title == "drop":
        items = items[~_is_blank(items["title"])].reset_index(drop=True)
        is_kept = item_id.isin(items["item_id"])
        note = (
            f"{_of(~is_kept)} interactions have an item without a title and are left out" if not is_kept.all() else ""
        )
        kept = _some(raw.interactions[is_kept], "data.on_empty_title=drop")
        return replace(raw, items=items, interactions=kept), note
    return raw, ""


def _with_times(raw: RawData, settings: DataSettings) -> tuple[RawData, str]:
    """A time for every interaction; and a note."""
    interactions = raw.interactions
    is_missing = interactions["timestamp"].isna()
    if not is_missing.any():
        return raw, ""
    if settings.on_missing_time == "drop":
        kept = _some(interactions[~is_missing], "data.on_missing_time=drop")
        return replace(raw, interactions=kept), f"{_of(is_missing)} interactions have no timestamp and are left out"
    positions = interactions.groupby("user_id", sort=False).cumcount().astype(float)
    note = f"{_of(is_missing)} interactions have no timestamp: all are in the order of the file"
    return replace(raw, interactions=interactions.assign(timestamp=positions)), note


def _with_ratings(raw: RawData, settings: DataSettings) -> tuple[RawData, str]:
    """A rating for every interaction, if ratings are looked at; and a note."""
    if settings.min_rating is None or not (is_missing := raw.interactions["rating"].isna()).any():
        return raw, ""
    kept = _some(raw.interactions[~is_missing], "data.on_missing_rating=drop")
    note = f"{_of(is_missing)} interactions have no number as {raw.rating_name} and are left out"
    return replace(raw, interactions=kept), note


def _rated(interactions: pd.DataFrame, least: float | None) -> pd.DataFrame:
    if least is None:
        return interactions
    return _some(interactions[interactions["rating"] >= least], f"data.min_rating={least:g}")


def _about_ratings(raw: RawData, settings: DataSettings) -> str:
    if settings.min_rating is not None or "rating" not in raw.interactions:
        return ""
    is_negative = raw.interactions["rating"] <= 0
    name = raw.rating_name
    return (
        f"the column {name} is not used: {_of(is_negative)} interactions have a {name} of 0 or less and count like the "
        "others; data.min_rating=1 leaves them out"
        if is_negative.any()
        else ""
    )


def _about_units(raw: RawData) -> str:
    """That some timestamps are far from the others: in another unit, or a number that stands for a missing time."""
    times = raw.interactions["timestamp"]
    usual = float(times.median())
    if usual < _EARLIEST:
        return ""
    is_far = (times < usual / _FAR) | (times > usual * _FAR)
    if not is_far.any():
        return ""
    return (
        f"{_of(is_far)} interactions have a timestamp that is more than {_FAR} times smaller or larger than most, such "
        f"as {times[is_far].iloc[0]:.15g}: a missing time, or another unit?"
    )


def _about_repeats(interactions: pd.DataFrame, settings: DataSettings) -> str:
    """How many interactions are not the only one of their user and item, and what is done about them."""
    pair = ["user_id", "item_id"]
    again = interactions.duplicated(pair)
    if not again.any():
        return ""
    pairs = interactions[interactions.duplicated(pair, keep=False)].groupby(pair, sort=False).size()
    equal = int(interactions.duplicated([*pair, "timestamp"]).sum())
    done = {
        "last": "the last by time of each pair is kept, the others are dropped; data.repeats=first keeps the first, "
        "keep all",
        "first": "the first by time of each pair is kept, the others are dropped; data.repeats=last keeps the last, "
        "keep all",
        "keep": "all are kept; data.repeats=last keeps the last by time of each pair",
    }
    return (
        f"{_of(again)} interactions repeat a user and an item that were there before ({len(pairs):,} pairs, at most "
        f"{int(pairs.max()):,} times{f'; {equal:,} with the same time too' if equal else ''}): {done[settings.repeats]}"
    )


def _some(kept: pd.DataFrame, setting: str) -> pd.DataFrame:
    if kept.empty:
        raise DataError(f"{setting} leaves no interactions")
    return kept


def _distinct_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The first of equal rows; the index is the row of the file."""
    return table.reset_index(drop=True).drop_duplicates()


def _is_blank(column: pd.Series) -> pd.Series:
    # Not column.str.fullmatch: with strings of pyarrow, its patterns have other rules.
    return column.isin([text for text in column.unique() if _INVISIBLE.fullmatch(text)])


def _of(chosen: pd.Series) -> str:
    return f"{int(chosen.sum()):,} of {len(chosen):,}"


def _first(wrong: pd.Series, what: str, locate: Locate) -> str:
    """How many rows are wrong, and the place of the first; the index is the row of the file."""
    if not wrong.any():
        return ""
    return f"{int(wrong.sum())} {what}, first at {locate(int(wrong.index[wrong.to_numpy().argmax()]))}"
