"""Amazon's reviews in the layout of their publishers, with made-up content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fellrec.data.clean import clean
from fellrec.data.files import files_name
from fellrec.data.readers import AmazonReader
from fellrec.data.settings import DataSettings
from fellrec.errors import DataError

REVIEWS_2018 = [
    {"overall": 5.0, "vote": "3", "verified": True, "reviewTime": "10 17, 2015", "reviewerID": "A1", "asin": "B1",
     "style": {"Format:": " Video Game"}, "reviewerName": "G. S.", "reviewText": "Fine.", "summary": "Five Stars",
     "unixReviewTime": 1445040000},
    {"overall": 2.0, "verified": False, "reviewTime": "07 27, 2015", "reviewerID": "A2", "asin": "B2",
     "reviewText": "No.", "summary": "Title", "unixReviewTime": 1437955200, "image": ["https://images.example/1.jpg"]},
]  # fmt: skip
META_2018 = [
    {"category": ["Video Games", "PC", "Games"], "tech1": "", "description": ["A game &amp; more"], "title": "Tom &amp; Jerry&#39;s Race",
     "also_buy": [], "brand": "Acme", "feature": [], "rank": ["1"], "main_cat": "Video Games", "price": "$1", "asin": "B1"},
    {"category": [], "title": "var aPageStart = (new Date()).getTime();\n", "brand": "", "main_cat": "Toys", "asin": "B2"},
    {"category": [], "title": "Another line of B1", "brand": "", "main_cat": "Toys", "asin": "B1"},
]  # fmt: skip
REVIEWS_2023 = [
    {"rating": 4.0, "title": "Title of the review", "text": "Good", "images": [], "asin": "B07DJWBYKP",
     "parent_asin": "B1", "user_id": "AG1", "timestamp": 1593352422858, "helpful_vote": 0, "verified_purchase": True},
    {"rating": 1.0, "title": "No", "text": "", "images": [], "asin": "B2", "parent_asin": "B2", "user_id": "AG2",
     "timestamp": 1452647382000, "helpful_vote": 1, "verified_purchase": False},
]  # fmt: skip
META_2023 = [
    {"main_category": "Video Games", "title": "Race", "average_rating": 4.5, "rating_number": 3, "features": [],
     "description": [], "price": None, "images": {"hi_res": [None]}, "videos": {"title": []}, "store": "Acme",
     "categories": ["Video Games", "PC"], "details": {"Pricing": "free"}, "parent_asin": "B1", "bought_together": None},
    {"main_category": None, "title": "", "store": None, "categories": [], "details": {}, "parent_asin": "B2"},
]  # fmt: skip


def lines(objects: list[dict[str, object]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in objects).encode()


def folder_2018(folder: Path) -> Path:
    (folder / "Video_Games_5.json.gz").write_bytes(gzip.compress(lines(REVIEWS_2018)))
    (folder / "meta_Video_Games.json.gz").write_bytes(gzip.compress(lines(META_2018)))
    return folder


def folder_2023(folder: Path) -> Path:
    (folder / "Video_Games.jsonl").write_bytes(lines(REVIEWS_2023))
    (folder / "meta_Video_Games.jsonl").write_bytes(lines(META_2023))
    return folder


def test_reviews_and_metadata_of_2018(tmp_path: Path) -> None:
    raw = AmazonReader(str(folder_2018(tmp_path)), version=2018).read()
    assert raw.interactions.to_dict("list") == {
        "user_id": ["A1", "A2"], "item_id": ["B1", "B2"], "rating": [5.0, 2.0], "timestamp": [1445040000.0, 1437955200.0],
    }  # fmt: skip
    assert raw.items.to_dict("list") == {
        "item_id": ["B1", "B2"], "title": ["Tom & Jerry's Race", ""], "genre": ["Video Games PC Games", "Toys"], "brand": ["Acme", ""],
    }  # fmt: skip
    assert [note.partition(":")[0] for note in raw.notes] == [
        "1 of 3 items have a title that is a piece of a program",
        "1 items are listed again with other values",
    ]
    with pytest.raises(DataError, match=r"1 items have an empty title .* first at .*meta_Video_Games.json.gz:2"):
        clean(raw, DataSettings("x", None))


def test_ratings_of_2018_have_no_header_and_the_item_first(tmp_path: Path) -> None:
    (tmp_path / "Video_Games.csv").write_text("B1,A1,5.0,1445040000\nB2,A2,2.0,1437955200\n")
    (tmp_path / "meta_Video_Games.json.gz").write_bytes(gzip.compress(lines(META_2018)))
    ratings = AmazonReader(str(tmp_path), version=2018).read()
    (tmp_path / "all").mkdir()
    reviews = AmazonReader(str(folder_2018(tmp_path / "all")), version=2018).read()
    assert ratings.interactions.equals(reviews.interactions)
    assert ratings.items.equals(reviews.items)


def test_reviews_metadata_and_ratings_of_2023(tmp_path: Path) -> None:
    raw = AmazonReader(str(folder_2023(tmp_path))).read()
    assert raw.interactions.to_dict("list") == {
        "user_id": ["AG1", "AG2"], "item_id": ["B1", "B2"], "rating": [4.0, 1.0], "timestamp": [1593352422858.0, 1452647382000.0],
    }  # fmt: skip
    assert raw.items.to_dict("list") == {
        "item_id": ["B1", "B2"], "title": ["Race", ""], "genre": ["Video Games PC", ""], "store": ["Acme", ""],
    }  # fmt: skip
    (tmp_path / "Video_Games.jsonl").unlink()
    text = "user_id,parent_asin,rating,timestamp\nAG1,B1,4.0,1593352422858\nAG2,B2,1.0,1452647382000\n"
    (tmp_path / "Video_Games.csv.gz").write_bytes(gzip.compress(text.encode()))
    ratings = AmazonReader(str(tmp_path)).read()
    assert ratings.interactions.equals(raw.interactions)
    assert ratings.items.equals(raw.items)


def test_the_file_is_found_or_what_to_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no file of reviews or ratings: CATEGORY.jsonl"):
        AmazonReader(str(tmp_path)).check()
    (folder_2023(tmp_path) / "Books.jsonl").write_bytes(lines(REVIEWS_2023))
    with pytest.raises(DataError, match="has Books.jsonl, Video_Games.jsonl; select one with data.reader.name=NAME"):
        AmazonReader(str(tmp_path)).check()
    with pytest.raises(DataError, match="unknown data.reader.name 'Video_Game'; choose from: Video_Games.jsonl, "):
        AmazonReader(str(tmp_path), name="Video_Game").check()
    AmazonReader(str(tmp_path), name="Video_Games").check()
    with pytest.raises(DataError, match=r"lacks the titles of Books.jsonl: meta_Books.jsonl or .json, .*metadata=none"):
        AmazonReader(str(tmp_path), name="Books").check()
    without = AmazonReader(str(tmp_path), name="Books", metadata="none").read()
    assert len(clean(without, DataSettings("x", None, on_empty_title="item_id")).raw.items) == 2
    with pytest.raises(DataError, match="lacks reviewerID, overall, .*: data=amazon_2023 reads it"):
        AmazonReader(str(tmp_path), name="Video_Games", version=2018).check()


def test_the_data_are_called_by_their_file(tmp_path: Path) -> None:
    reader = {"_target_": "fellrec.data.readers.AmazonReader"}
    assert files_name({"root": str(folder_2018(tmp_path)), "reader": reader}) == "Video_Games_5"
    assert files_name({"root": str(tmp_path), "reader": {**reader, "name": "Books.jsonl"}}) == "Books"
    (tmp_path / "Video_Games.csv").write_text("")
    assert files_name({"root": str(tmp_path), "reader": reader}) == tmp_path.name
