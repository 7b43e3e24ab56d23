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

from .charts import COLOURS, NUMBERED, charts, classes_of, png, svg
from .data.images import load_images
from .errors import RunError, phase
from .results import Answer, Run, read_run
from .training.output_folder import PAGE, PICTURE, REPORT_DATA, OutputFolder

SAMPLES, MISTAKES = 24, 16  # at most so many samples, and so many mistakes while others are there
SIDE = 240  # pixels of a sample's image; of several ones, half of it
MOST_TEXT = 240  # characters of a question or an answer
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
    title = escape(" / ".join(run.name for run in runs))
    keys = [f'<span class="key" style="--key: {COLOURS[n % 6]}">' for n in range(len(runs))]
    names = [f"{key}{escape(run.name)}</span>" for key, run in zip(keys, runs, strict=True)]
    figures = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>"
        for chart in charts(runs)
    )
    parts = [
        f"<h1>{title}</h1>{_table(runs, names)}",
        f'<div class="grid">{figures}</div>',
        *(_confused(run, name) for run, name in zip(runs, names, strict=True)),
        _samples(runs, names),
        *(_about(run, name) for run, name in zip(runs, names, strict=True)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _table(runs: list[Run], names: list[str]) -> str:
    """Metrics from the first evaluation to the last, and what the whole training was like."""
    metrics = dict.fromkeys(
        name for run in runs for each in run.evaluations for name in each.metrics
    )
    rows = {name: [_progress(run, name) for run in runs] for name in metrics}
    for field, label in NUMBERS.items():
        values = [run.summary(field) for run in runs]
        rows[label] = ["" if value is None else f"{value:,.4g}" for value in values]
    lines = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
        if any(cells)
    ]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="table"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _progress(run: Run, metric: str) -> str:
    shown = [run.evaluations[0], run.last] if len(run.evaluations) > 1 else [run.last]
    values = [(f"{e.metrics[metric]:.4f}", e.label) for e in shown if metric in e.metrics]
    return " → ".join(f"{value} {escape(label)}" for value, label in values)


def _confused(run: Run, name: str) -> str:
    """Of many classes, the mistakes that are made most often."""
    rows = run.last.answers.values()
    pairs = Counter((row.answers[0], row.text) for row in rows if not row.right)
    if len(classes_of(run)) <= NUMBERED or not pairs:
        return ""
    lines = (
        f"<tr><td>{count}</td><td>{escape(answer)}</td><td>{escape(text)}</td></tr>"
        for (answer, text), count in pairs.most_common(10)
    )
    head = "<tr><th>times</th><th>true</th><th>predicted</th></tr>"
    table = f'<div class="table"><table>{head}{"".join(lines)}</table></div>'
    return f"<h2>Confused most often, {name}</h2>{table}"


def _samples(runs: list[Run], names: list[str]) -> str:
    """What each run says to the samples; of a single one, before and after as well."""
    said = [(name, run.last.answers) for name, run in zip(names, runs, strict=True)]
    if len(runs) == 1:
        [run] = runs
        ends = run.evaluations[:: len(run.evaluations) - 1 or 1]
        said = [(escape(each.label), each.answers) for each in ends]
    samples = {sample["id"]: sample for run in reversed(runs) for sample in run.samples}
    shown = [each for each in samples.values() if each["id"] in said[-1][1]]
    shown.sort(
        key=lambda each: all(a[each["id"]].right for _, a in said[-len(runs) :] if each["id"] in a)
    )
    cards = "".join(_card(each, said) for each in shown[:SAMPLES])
    counted = ", ".join(
        f"{sum(not a.right for a in run.last.answers.values()):,} of "
        f"{len(run.last.answers):,} are not exactly right" + (f" ({name})" if len(runs) > 1 else "")
        for run, name in zip(runs, names, strict=True)
    )
    heading = f"<h2>Samples, mistakes first</h2><p>{counted}</p>"
    return f'{heading}<div class="grid samples">{cards}</div>' if cards else ""


def _card(sample: dict, said: list[tuple[str, dict[str, Answer]]]) -> str:
    found = [(who, a[sample["id"]]) for who, a in said if sample["id"] in a]
    lines = "".join(
        f"<p><small>{who}</small> {'✓' if answer.right else '✗'} {cut(answer.text) or '—'}"
        + ("" if answer.probability is None else f" <small>{answer.probability:.3f}</small>")
        + "</p>"
        for who, answer in found
    )
    answers = cut(" | ".join(found[-1][1].answers))
    images = "".join(
        f'<img alt="" src="data:image/webp;base64,{escape(image)}">' for image in sample["images"]
    )
    kind = "right" if found[-1][1].right else "wrong"
    return (
        f'<article class="{kind}"><div class="images">{images}</div>'
        f"<p>{cut(sample['question'])}</p><p><small>answer</small> {answers}</p>{lines}"
        f"<small>{escape(sample['id'])}</small></article>"
    )


def cut(text: str) -> str:
    """A text that takes no more than its share of a page, escaped; the whole is in eval_*.json."""
    return escape(text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…")


def _about(run: Run, name: str) -> str:
    items = "".join(f"<li>{escape(line.replace('`', ''))}</li>" for line in run.about)
    command = f"<pre>{escape(run.command)}</pre>" if run.command else ""
    return f"<h2>How {name} came about</h2><ul>{items}</ul>{command}" if items else ""


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
        if len({run.name for run in runs}) < len(runs):
            for run, folder in zip(runs, args.folders, strict=True):
                run.name = str(folder)
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
