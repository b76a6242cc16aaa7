"""Readers: one class per format, each with ``read`` and ``fingerprint``."""

from fellrec.data.readers.atomic import AtomicReader
from fellrec.data.readers.movielens import MovieLens1MReader, MovieLens100KReader
from fellrec.data.readers.synthetic import SyntheticReader

__all__ = ["AtomicReader", "MovieLens100KReader", "MovieLens1MReader", "SyntheticReader"]
