"""Samples in the form that collators take, with images in them."""

from PIL import Image


def turn(user: str, assistant: str, *images) -> dict:
    return {"images": list(images), "user": user, "assistant": assistant}


def record(*turns: dict) -> dict:
    return {"id": "x", "source": "test", "conversations": list(turns)}


def image(size=(64, 48), color="red") -> Image.Image:
    return Image.new("RGB", size, color)


RECORDS = [
    record(turn("What?", "DigitOne", image(), image())),
    record(turn("Hello", "A longer answer. It has two sentences.")),
    record(
        turn("Look", "Seen", image()),
        turn("And?", "No image"),
        turn("This?", "Yes", image(), image()),
    ),
]
# With an image of another shape than the others', and a short one.
MORE = [
    *RECORDS,
    record(turn("A wide one", "Yes", image((300, 40)))),
    record(turn("x", "y")),
]
