"""Rows or lines to records to batches: what a recipe imports."""

from .formats import load_records
from .mixing import Mixture, mix
from .preparation import prepare
from .records import Records
from .sources import load_rows

__all__ = ["Mixture", "Records", "load_records", "load_rows", "mix", "prepare"]
