"""Metrics on cases worked out by hand."""

import random

import pytest

from phi3v.training.metrics import accuracy, anls, auroc, normalise


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


@pytest.mark.parametrize(
    ("prediction", "accepted", "score"),
    [
        ("1/8/93", ["1/8/93"], 1.0),
        ("ITC Limited", ["itc  limited"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abc", ["abd", "abcd"], 0.75),
        ("abcd", ["abxy"], 0.5),  # on the threshold counts
        ("abcde", ["abxyz"], 0.0),  # 0.4 is below it
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("Müller", ["Muller"], 1 - 1 / 6),
    ],
)
def test_anls(prediction, accepted, score):
    """The best of the accepted answers, nothing below the threshold, case-insensitive."""
    assert anls([prediction], [accepted]) == pytest.approx(score)
    assert anls([prediction, "x"], [accepted, ["x"]]) == pytest.approx((score + 1) / 2)


def test_auroc_is_the_share_of_pairs_in_order():
    """AUROC against its definition: the chance that a positive outranks a negative."""
    rng = random.Random(0)
    positive = [rng.random() < 0.4 for _ in range(60)]
    scores = [round(rng.random() + 0.3 * label, 1) for label in positive]  # with ties
    pairs = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i in range(60)
        for j in range(60)
        if positive[i] and not positive[j]
    ]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="both classes"):
        auroc([0.1, 0.2], [True, True])
