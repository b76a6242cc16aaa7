"""Items by what people type."""

from __future__ import annotations

import pandas as pd
import pytest

from fellrec.data.schema import Catalogue
from fellrec.data.titles import items_of
from fellrec.errors import DataError

CATALOGUE = Catalogue(
    ("m1", "m2", "m3", "Heat"), ("Heat (1995)", "Casino", "m1", "Alien"), pd.DataFrame(index=range(4))
)


def test_titles_and_item_ids_name_items() -> None:
    """Where a title is the id of another item, the title counts."""
    assert items_of(["heat (1995)", "CASINO", "m2", "m1", "Heat"], CATALOGUE) == [0, 1, 1, 2, 3]


def test_a_title_that_is_not_there_names_similar_ones_or_some() -> None:
    with pytest.raises(DataError, match=r"no item is called 'Casin'; did you mean 'Casino'"):
        items_of(["Casin"], CATALOGUE)
    with pytest.raises(
        DataError, match=r"no title is similar; the catalogue begins with 'Heat \(1995\)', 'Casino', 'm1'"
    ):
        items_of(["xyzzyx qqq"], CATALOGUE)
