"""Small datasets in the forms that the recipes read. Pictures of one colour; nothing to learn."""

import json
from pathlib import Path

import datasets
from PIL import Image

COLORS = ["red", "lime", "blue"]


def picture(index: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, COLORS[index % 3])


def write_parquet(folder: Path, split: str, rows: list[dict]) -> Path:
    """A split in the hub's form: rows of columns, images encoded."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = datasets.Dataset.from_dict(columns).features
    if "image" in features:
        features["image"] = datasets.Image()
    if "images" in features:
        features["images"] = datasets.List(datasets.Image())
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def cauldron_row(index: int, images: int, *questions: tuple[str, str]) -> dict:
    """A row of the_cauldron."""
    return {
        "images": [picture(index + i) for i in range(images)],
        "texts": [{"user": u, "assistant": a, "source": "x"} for u, a in questions],
    }


def examples_row(index: int) -> dict:
    """A row of docvqa_1200_examples."""
    return {
        "id": f"page_{index}",
        "image": picture(index, (30, 60)),
        "query": {"en": f"What is number {index}?", "de": "Welche Zahl?"},
        "answers": [f"number {index}", str(index)],
    }


def write_videos(folder: Path, split: str, count: int) -> Path:
    """What the converter writes: two frames a video, and the jsonl."""
    lines = []
    for number in range(count):
        name = f"Digit{['One', 'Two'][number % 2]}"
        images = [f"{split}/{name}/{number}.{i}.jpg" for i in range(2)]
        for index, image in enumerate(images):
            path = folder / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number + index, (64, 48)).save(path)
        turn = {"images": images, "user": "Which digit?", "assistant": name}
        record = {"id": f"{split}-{number}", "source": "ucf101", "conversations": [turn]}
        lines.append(json.dumps(record) + "\n")
    (folder / f"ucf101_{split}.jsonl").write_text("".join(lines))
    return folder
