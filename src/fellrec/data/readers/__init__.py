"""Readers: one class per format, each with ``read`` and ``fingerprint``."""

from fellrec.data.readers.amazon import AmazonReader
from fellrec.data.readers.atomic import AtomicReader
from fellrec.data.readers.micro_lens import MicroLensReader
from fellrec.data.readers.movielens import MovieLens1MReader, MovieLens100KReader, MovieLensCsvReader
from fellrec.data.readers.own import TableReader
from fellrec.data.readers.synthetic import SyntheticReader

__all__ = [
    "AmazonReader",
    "AtomicReader",
    "MicroLensReader",
    "MovieLens1MReader",
    "MovieLens100KReader",
    "MovieLensCsvReader",
    "SyntheticReader",
    "TableReader",
]
