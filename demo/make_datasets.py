"""Make small datasets of real scans and photos, in the layouts of the recipes' hub datasets.

    python -m demo.make_datasets docvqa --out demo_output/docvqa/data
    python -m demo.make_datasets hateful_memes --out demo_output/hateful_memes/data
    python -m demo.make_datasets nlvr2 --out demo_output/nlvr2/data

The pictures are scikit-learn's 1,797 real scans of handwritten digits and its two photos, of a
temple and of a flower; they come with the package, so nothing is downloaded. Scans and photos are
dealt out before any picture is made: evaluation shows no scan and no part of a photo that training
shows. The same arguments give the same files, byte for byte.

docvqa: a page with two handwritten digits, one below the other. The question names the place of
    one. Chance is 1 in 10, and 1 in 2 for who reads the page but not the question. The columns are
    those of nielsr/docvqa_1200_examples; a file for each of the splits train and test.
hateful_memes: a harmless stand-in, a photo with a number written on it. Zero goes with the flower
    and one with the temple. Neither the photo nor the number alone says anything about the answer,
    as a meme's picture and text may be hateful only together. Chance is 1 in 2.
nlvr2: two photos and a statement about both. Each statement is true in every other row, so it says
    nothing without the photos. Chance is 1 in 2.

The last two have the columns of the_cauldron and one split. The recipes evaluate on its first rows,
so the pictures for evaluation are in these.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from demo.make_videos import FRAME_SIZE, split_scans

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Where in its photo a thing is: left, top, right, bottom in pixels. Two of its quarters train and
# two evaluate, crosswise, so that both splits have its top and its foot, its light and its shade.
PHOTOS = {
    "temple": ("china.jpg", (70, 60, 350, 340)),
    "flower": ("flower.jpg", (175, 85, 441, 345)),
}
CROP_SIZE = (72, 120)  # pixels of the photo, smallest and largest, before scaling to FRAME_SIZE
DIGIT_SIZE = (50, 56)

PAGE_QUESTIONS = {"en": "Which digit is at the {}?", "de": "Welche Ziffer steht {}?"}
PLACES = {"en": ("top", "bottom"), "de": ("oben", "unten")}
MEME_QUESTION = "A flower goes with zero and a temple goes with one. Is this meme right?"
# With whether it is true, if this is whether the left and the right picture show a flower.
STATEMENTS: dict[str, Callable[[bool, bool], bool]] = {
    "Both pictures show a flower.": lambda left, right: left and right,
    "Exactly one picture shows a flower.": lambda left, right: left != right,
    "The left picture shows a flower.": lambda left, right: left,
    "The right picture shows a flower.": lambda left, right: right,
}


class Pictures:
    """Draws pictures from the scans and the parts of the photos that one split may show."""

    def __init__(self, split: str, seed: int):
        self.split = split
        digits = load_digits()
        scans = split_scans(digits.target, seed)[split]
        self.scans = [digits.images[pool] for pool in scans]
        self.photos = {thing: quarters(thing)[split] for thing in PHOTOS}

    def page(self, labels: list[int], rng: np.random.Generator) -> Image.Image:
        """Two handwritten digits, one below the other, dark on light paper."""
        page = np.empty((2 * FRAME_SIZE, FRAME_SIZE, 3))
        page[:] = rng.uniform(200, 255, size=3)
        for half, label in zip(np.split(page, 2), labels, strict=True):
            self._write(half, label, rng.uniform(0, 60, size=3), rng)
        return to_image(page)

    def photo(self, thing: str, rng: np.random.Generator) -> Image.Image:
        """A part of a photo in other light, mirrored or not."""
        return to_image(self._crop(thing, rng))

    def meme(self, thing: str, label: int, rng: np.random.Generator) -> Image.Image:
        """A part of a photo with a handwritten digit on it."""
        picture = self._crop(thing, rng)
        self._write(picture, label, rng.uniform(235, 255, size=3), rng)
        return to_image(picture)

    def _crop(self, thing: str, rng: np.random.Generator) -> np.ndarray:
        quarter = self.photos[thing][rng.integers(2)]
        size = rng.integers(*CROP_SIZE, endpoint=True)
        top, left = (rng.integers(room - size, endpoint=True) for room in quarter.shape[:2])
        crop = quarter[top : top + size, left : left + size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        scaled = Image.fromarray(crop).resize((FRAME_SIZE, FRAME_SIZE), Image.BICUBIC)
        return np.asarray(scaled) * rng.uniform(0.6, 1, size=3)

    def _write(
        self, picture: np.ndarray, label: int, colour: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Draw a scan of the digit into the picture."""
        scan = rng.choice(self.scans[label])
        size = rng.integers(*DIGIT_SIZE, endpoint=True)
        top, left = rng.integers(FRAME_SIZE - size, size=2, endpoint=True)
        ink = Image.fromarray((scan * 255 / 16).astype(np.uint8))
        mask = np.asarray(ink.resize((size, size), Image.BICUBIC))[:, :, None] / 255
        place = picture[top : top + size, left : left + size]
        place += mask * (colour - place)


def quarters(thing: str) -> dict[str, list[np.ndarray]]:
    """Split -> the two quarters of a thing's photo that it may show."""
    name, (left, top, right, bottom) = PHOTOS[thing]
    upper, lower = np.array_split(load_sample_image(name)[top:bottom, left:right], 2)
    (a, b), (c, d) = (np.array_split(half, 2, axis=1) for half in (upper, lower))
    return {"train": [a, d], "test": [b, c]}


def to_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture.round().astype(np.uint8))


def docvqa_row(index: int, pictures: Pictures, rng: np.random.Generator) -> dict:
    """The answers and the places go round, and the page's other digit is another one.

    But half of the training pages show the digit twice: reading is learned on these, and then the
    places on the others.
    """
    label, place = index % 10, index // 10 % 2
    training = pictures.split == "train"
    twice = training and rng.random() < 0.5
    other = label if twice else (label + int(rng.integers(1, 10))) % 10
    labels = [label, other] if place == 0 else [other, label]
    query = {
        language: question.format(PLACES[language][place])
        for language, question in PAGE_QUESTIONS.items()
    }
    # The recipe draws its target from the answers, and two targets take much longer to learn.
    answers = [str(label)] if training else [str(label), NUMBER_WORDS[label]]
    return {"image": pictures.page(labels, rng), "query": query, "answers": answers}


def hateful_memes_row(index: int, pictures: Pictures, rng: np.random.Generator) -> dict:
    """All pairs of a photo and a number go round."""
    thing, label = index % 2, index // 2 % 2
    image = pictures.meme(("flower", "temple")[thing], label, rng)
    return cauldron_row([image], MEME_QUESTION, "Yes." if thing == label else "No.")


def nlvr2_row(index: int, pictures: Pictures, rng: np.random.Generator) -> dict:
    """The answers and the statements go round. The photos are drawn among those that fit."""
    answer = index % 2 == 0
    statement, is_true = list(STATEMENTS.items())[index // 2 % len(STATEMENTS)]
    pairs = [(left, right) for left in (True, False) for right in (True, False)]
    flowers = rng.choice([pair for pair in pairs if is_true(*pair) == answer])
    images = [pictures.photo("flower" if flower else "temple", rng) for flower in flowers]
    return cauldron_row(images, f"{statement} Is this true or false?", f"{answer}.")


def cauldron_row(images: list[Image.Image], user: str, assistant: str) -> dict:
    return {
        "images": images,
        "texts": [{"user": user, "assistant": assistant, "source": "demo"}],
    }


ROWS = {"docvqa": docvqa_row, "hateful_memes": hateful_memes_row, "nlvr2": nlvr2_row}


def make_rows(task: str, split: str, count: int, seed: int) -> list[dict]:
    """The rows of one split, without ids."""
    pictures = Pictures(split, seed)
    return [
        # A seed of its own: a row stays the same when the number of rows changes.
        ROWS[task](index, pictures, np.random.default_rng((seed, split == "test", index)))
        for index in range(count)
    ]


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=ROWS)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the parquet files")
    parser.add_argument("--train_rows", type=int, default=3200)
    parser.add_argument("--eval_rows", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0, help="other scans, crops and colours")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    datasets.disable_progress_bars()  # done in no time
    train = make_rows(args.task, "train", args.train_rows, args.seed)
    evaluation = make_rows(args.task, "test", args.eval_rows, args.seed)
    if args.task == "docvqa":
        splits = {"train": train, "test": evaluation}
    else:
        splits = {"train": evaluation + train}
    for split, rows in splits.items():
        if args.task == "docvqa":
            rows = [{"id": f"{split}_{index}", **row} for index, row in enumerate(rows)]
        write_parquet(args.out / f"{split}-00000-of-00001.parquet", rows)
    print(f"{args.out}: {len(train)} rows to train on, {len(evaluation)} to evaluate on")


if __name__ == "__main__":
    main()
