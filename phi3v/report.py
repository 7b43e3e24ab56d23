"""
The report of a run, or of several side by side, as one page that opens without a network:

    python -m phi3v.report OUTPUT_DIR              # makes OUTPUT_DIR/report.html again
    python -m phi3v.report DIR DIR ... --out FILE  # compares

A run writes it at every evaluation. The page is made of what the output folder holds; the pictures
of its samples, the command and the versions come from report.json there.
"""

import argparse
import base64
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from .charts import NUMBERED, charts, classes_of, colour, png, svg
from .data.images import load_images
from .errors import RunError, phase
from .results import Answer, Run, read_run
from .training.output_folder import PAGE, PICTURE, REPORT_DATA, OutputFolder

SAMPLES, MISTAKES = 24, 16  # at most so many samples, and so many mistakes while others are there
SIDE = 240  # pixels of a sample's image; of several ones, half of it
MOST_TEXT = 240  # characters of a question or an answer
NOTHING = "—"
CSS = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent) }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 1240px; margin: auto; padding: 0 16px 32px;
  overflow-wrap: anywhere }
h1, h2 { line-height: 1.2; margin: 28px 0 12px }
svg { display: block; width: 100%; height: auto }
figure, article { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px;
  min-width: 0 }
figcaption { font-weight: 600; margin-bottom: 8px }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  330px), 1fr)); align-items: start }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)) }
.table { overflow-x: auto; margin-bottom: 24px }
table { border-collapse: collapse; overflow-wrap: normal }
td, th { padding: 4px 16px 4px 0; text-align: left; border-bottom: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; padding: 12px; border: 1px solid var(--line); border-radius: 8px }
.images { display: flex; flex-wrap: wrap; gap: 4px; justify-content: center; margin-bottom: 8px }
img { max-width: 100%; border-radius: 4px }
article p { margin: 0 0 8px; white-space: pre-line }
article small { opacity: 0.75 }
.wrong { border-top: 4px solid #ef4444 }
.right { border-top: 4px solid #059669 }
.key::before { content: ""; display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  border-radius: 3px; background: var(--key) }
"""
NUMBERS = {
    "train_samples_per_second": "samples/s",
    "train_tokens_per_second": "tokens/s",
    "train_crops_per_second": "crops/s",
    "train_mfu": "MFU",
    "train_tflops_per_second": "TFLOP/s per process",
    "train_data_wait": "waiting for data, share",
    "train_peak_memory_gb_per_process": "peak memory, GB",
    "train_runtime": "training, seconds",
    "train_loss": "loss, mean",
    "step": "steps",
}


# ---- What a run writes


def write_report(
    folder: OutputFolder,
    about: list[str],
    command: str,
    records: Sequence[dict],
    answers: list[Answer],
    choices: list[str],
) -> None:
    """
    Write report.json, report.html and report.png of the state that the folder is in.

    Args:
        about, command: how the model comes about, and the command line.
        records, answers: of the last evaluation.
        choices: the two answers that probabilities are of, normalised; or none.
    """
    samples = [sample(records[index]) for index in choose(answers)]
    data = {"about": about, "command": command, "choices": choices, "samples": samples}
    folder.write_json(REPORT_DATA, data)
    run = read_run(folder.path)
    with folder.finished_files() as unfinished:
        (unfinished / PAGE).write_text(page([run]), "utf-8")
        (unfinished / PICTURE).write_bytes(png([*charts([run])]))


def choose(answers: list[Answer]) -> list[int]:
    """Which samples to show: at most SAMPLES, mistakes first, drawn by chance."""
    wrong = [index for index, answer in enumerate(answers) if not answer.right]
    right = [index for index, answer in enumerate(answers) if answer.right]
    draw = random.Random(0).sample
    shown = draw(wrong, min(len(wrong), max(MISTAKES, SAMPLES - len(right))))
    return sorted(shown) + sorted(draw(right, min(len(right), SAMPLES - len(shown))))


def sample(record: dict) -> dict[str, object]:
    """A record's id, its last question, and up to four of its images, each a WebP in base64."""
    images = load_images(record)
    images = images[:: -(-len(images) // 4) or 1]
    side = SIDE if len(images) < 2 else SIDE // 2
    return {
        "id": record["id"],
        "question": record["conversations"][-1]["user"],
        "images": [thumbnail(image, side) for image in images],
    }


def thumbnail(image: Image.Image, side: int) -> str:
    file = io.BytesIO()
    ImageOps.contain(image.convert("RGB"), (side, side)).save(file, "WEBP", quality=60)
    return base64.b64encode(file.getvalue()).decode()


# ---- The page


def page(runs: list[Run]) -> str:
    """The report of one run, or of several."""
    title = escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side")
    names = [escape(run.name) for run in runs]
    if len(runs) > 1:
        key = '<span class="key" style="--key: {}">{}</span>'
        names = [key.format(colour(number), name) for number, name in enumerate(names)]
    figures = (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>"
        for chart in charts(runs)
    )
    parts = [
        f"<h1>{title}</h1>",
        _table(names if len(runs) > 1 else [], _numbers(runs)),
        f'<div class="grid">{"".join(figures)}</div>',
        *(_confused(run, name) for run, name in zip(runs, names, strict=True)),
        *(_about(run, name) for run, name in zip(runs, names, strict=True)),
        _samples(runs, names),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _table(head: list[str], rows: dict[str, list[str]]) -> str:
    """Rows by their names. All are HTML."""
    lines = {"": head, **rows} if head else rows
    cells = (
        f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
        for name, line in lines.items()
    )
    return f'<div class="table"><table>{"".join(cells)}</table></div>'


def _numbers(runs: list[Run]) -> dict[str, list[str]]:
    """Metrics from the first evaluation to the last, and what the whole training was like."""
    found = [name for run in runs for each in run.evaluations for name in each.metrics]
    rows = {
        escape(", ".join(filter(None, name))): [_progress(run, name) for run in runs]
        for name in found
    }
    for field, label in NUMBERS.items():
        values = [run.summary(field) for run in runs]
        if any(value is not None for value in values):
            rows[label] = ["" if value is None else f"{value:,.4g}" for value in values]
    return rows


def _progress(run: Run, metric: tuple[str, str]) -> str:
    ends = run.evaluations[:: len(run.evaluations) - 1 or 1]
    return " → ".join(f"{e.metrics[metric]:.4f} {e.label}" for e in ends if metric in e.metrics)


def _confused(run: Run, name: str) -> str:
    """Of many classes, the mistakes that are made most often."""
    rows = run.last.answers.values()
    pairs = Counter((row.answers[0], row.text) for row in rows if not row.right).most_common(10)
    if len(classes_of(run)) <= NUMBERED or not pairs:
        return ""
    table = {
        f"{cut(answer)} → {cut(text) or NOTHING}": [f"{count} times"]
        for (answer, text), count in pairs
    }
    return f"<h2>Mistaken most often, {name}</h2>{_table([], table)}"


def _samples(runs: list[Run], names: list[str]) -> str:
    """What each run says to the samples; of a single one, before and after."""
    last = [run.last.answers for run in runs]
    said = list(zip(names, last, strict=True))
    if len(runs) == 1:
        [run] = runs
        ends = run.evaluations[:: len(run.evaluations) - 1 or 1]
        said = [(each.label, each.answers) for each in ends]

    def right(sample: dict) -> bool:
        return all(answers[sample["id"]].right for answers in last if sample["id"] in answers)

    samples = {sample["id"]: sample for run in runs for sample in run.samples}.values()
    known = [sample for sample in samples if any(sample["id"] in answers for answers in last)]
    cards = [_card(sample, said, right(sample)) for sample in sorted(known, key=right)[:SAMPLES]]
    wrong = (
        f"{name}: {sum(not each.right for each in answers.values()):,} of {len(answers):,} answers "
        "are not exactly right"
        for name, answers in zip(names, last, strict=True)
    )
    heading = f"<h2>Samples, mistakes first</h2><p>{'<br>'.join(wrong)}</p>"
    return f'{heading}<div class="grid samples">{"".join(cards)}</div>' if cards else ""


def _card(sample: dict, said: list[tuple[str, dict[str, Answer]]], right: bool) -> str:
    found = [(who, answers[sample["id"]]) for who, answers in said if sample["id"] in answers]
    lines = [("answer", cut(" | ".join(found[0][1].answers)))]
    for who, answer in found:
        text = f"{'✓' if answer.right else '✗'} {cut(answer.text) or NOTHING}"
        if answer.probability is not None:
            text += f" <small>{answer.probability:.3f}</small>"
        lines.append((who, text))
    images = "".join(
        f'<img alt="" src="data:image/webp;base64,{escape(image)}">' for image in sample["images"]
    )
    return (
        f'<article class="{"right" if right else "wrong"}"><div class="images">{images}</div>'
        + f"<p>{cut(sample['question'])}</p>"
        + "".join(f"<p><small>{who}</small> {text}</p>" for who, text in lines)
        + f"<small>{escape(sample['id'])}</small></article>"
    )


def cut(text: str) -> str:
    """A text that takes no more than its share of a page, escaped; the whole is in eval_*.json."""
    return escape(text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…")


def _about(run: Run, name: str) -> str:
    items = "".join(f"<li>{escape(line.replace('`', ''))}</li>" for line in run.about)
    said = f"<ul>{items}</ul><pre>{escape(run.command)}</pre>" if items else ""
    return said and f"<h2>How {name} came about</h2>{said}"


# ---- The command


def main(argv: list[str] | None = None) -> int:
    """Write the page, say where it is, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3v.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: OUTPUT_DIR/{PAGE}; of several, comparison.html)",
    )
    args = parser.parse_args(argv)
    several = len(args.folders) > 1
    out = args.out or (Path("comparison.html") if several else args.folders[0] / PAGE)
    try:
        runs = [read_run(folder) for folder in args.folders]
        if several:  # by the parts of their paths that tell them apart
            paths = [folder.resolve() for folder in args.folders]
            for run, path in zip(runs, paths, strict=True):
                run.name = os.path.relpath(path, os.path.commonpath(paths))
        with phase(str(out)):
            unfinished = out.with_name(f".{out.name}.tmp")
            unfinished.write_text(page(runs), "utf-8")
            os.replace(unfinished, out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
