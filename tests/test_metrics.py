"""Metrics on cases worked out by hand."""

import pytest

from phi3v.metrics import accuracy, normalise


def test_normalise():
    """White space and full stops around a text do not count, nor does case."""
    assert normalise(" BabyCrawling. \n") == "babycrawling"
    assert normalise("...") == "" and normalise("1.5 m.") == "1.5 m"


def test_accuracy():
    """The share of equal texts; nothing to compare is an error, not a number."""
    assert accuracy(["A.", "b", "c", ""], ["a", "B ", "d", "e"]) == 0.5
    with pytest.raises(ValueError, match="0 predictions"):
        accuracy([], [])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        accuracy(["a"], ["a", "b"])
