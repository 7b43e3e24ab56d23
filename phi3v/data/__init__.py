"""Rows or lines to records to batches: what a recipe imports."""

from .formats import load_records
from .preparation import prepare
from .records import Records
from .sources import load_rows

__all__ = ["Records", "load_records", "load_rows", "prepare"]
