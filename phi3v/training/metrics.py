"""What the recipes measure."""

import string

from rapidfuzz.distance import Levenshtein


def normalise(text: str) -> str:
    """Text as it is compared: without white space and full stops around it, in lower case."""
    return text.strip(string.whitespace + ".").lower()


def metrics_of(content: dict) -> dict[tuple[str, str], float]:
    """
    The metrics in an evaluation's file, by (metric, dataset); ("accuracy", "") is that of all
    samples, and only a mixture has others.
    """
    parts = {"": content, **content.get("datasets", {})}
    return {
        (metric, dataset): value
        for metric, whole in content.items()
        if isinstance(whole, int | float)
        for dataset, numbers in parts.items()
        if (value := numbers.get(metric)) is not None
    }


def accuracy(predictions: list[str], answers: list[str]) -> float:
    """The share of predictions that are their answer, both normalised; between 0 and 1."""
    _check_lengths(predictions, answers)
    pairs = zip(predictions, answers, strict=True)
    return sum(normalise(guess) == normalise(answer) for guess, answer in pairs) / len(answers)


def anls(predictions: list[str], answers: list[list[str]], threshold: float = 0.5) -> float:
    """
    Average normalised Levenshtein similarity, DocVQA's metric; between 0 and 1.

    A prediction scores its similarity to the closest of its accepted answers, and nothing below
    `threshold`. Case and runs of white space do not count, as in the official evaluation
    (Biten et al., Scene Text Visual Question Answering, ICCV 2019, arXiv:1905.13648).
    """
    _check_lengths(predictions, answers)
    best = [
        max(_similarity(guess, answer) for answer in accepted)
        for guess, accepted in zip(predictions, answers, strict=True)
    ]
    return sum(score for score in best if score >= threshold) / len(best)


def auroc(probabilities: list[float], positive: list[bool]) -> float:
    """Area under the ROC curve of the probability of the positive answer; between 0 and 1."""
    # Imported here: it takes a second, and one recipe of four uses it.
    from sklearn.metrics import roc_auc_score

    _check_lengths(probabilities, positive)
    if len(set(positive)) < 2:
        raise ValueError("AUROC needs samples of both classes; all have the same answer.")
    return float(roc_auc_score(positive, probabilities))


def _check_lengths(predictions: list, answers: list) -> None:
    if len(predictions) != len(answers) or not answers:
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers.")


def _similarity(first: str, second: str) -> float:
    """1 - edit distance / length of the longer text."""
    first, second = (" ".join(text.lower().split()) for text in (first, second))
    return Levenshtein.normalized_similarity(first, second)
