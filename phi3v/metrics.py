"""What the recipes measure."""

import string


def normalise(text: str) -> str:
    """Text as it is compared: without white space and full stops around it, in lower case."""
    return text.strip(string.whitespace + ".").lower()


def accuracy(predictions: list[str], answers: list[str]) -> float:
    """The share of predictions that are their answer, both normalised; between 0 and 1."""
    if len(predictions) != len(answers) or not answers:
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers.")
    pairs = zip(predictions, answers, strict=True)
    return sum(normalise(guess) == normalise(answer) for guess, answer in pairs) / len(answers)
