"""The report of a run: what is on the page, what its making costs, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from helpers.trainers import arguments, make_trainer
from phi3v.report import choose, main, write_report
from phi3v.results import Answer
from phi3v.training.output_folder import OutputFolder
from phi3v.training.throughput import histogram

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NASTY = '<img src="http://x/"> & $x_1$ "quoted" <script>'
COMMAND = f"python recipe.py --wd 0.1 --output_dir '{NASTY}' {'--a_long_flag ' * 12}"
KINDS = {
    "classes": ["ApplyEyeMakeup", "a", "a class of many words <b>"],
    "texts": ["nine", "page 4 of 10", "a"],
    "choices": ["yes", "no"],
}
DATASETS = ("a_dataset_of_a_long_name", "b")


def made(folder: Path, kind: str, samples: int = 40, steps: int = 500, seed: int = 0) -> Path:
    """An output folder as a run leaves it, of answers drawn by chance."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    names = KINDS.get(kind) or [f"class {number}" for number in range(101)]
    names = [name.lower() for name in names]
    ids = [f"{kind}-{number}" for number in range(samples)]
    truths = [names[number % len(names)] for number in range(samples)]
    for file, share in (("eval_before", 0.1), ("eval_step_200", 0.5), ("eval_after", 0.7)):
        texts = [t if random.random() < share else f"{t[:-1]}x" for t in truths]
        texts[:9] = ["", *names[:1] * 7, NASTY.lower() * 9]  # mistakes, most of them
        content = {
            "accuracy": share,
            "ids": ids,
            "answers_unique": [[t, "other"] for t in truths] if kind == "texts" else truths,
            "generated_texts_unique": texts,
        }
        if kind == "choices":
            content |= {"auroc": share, "probabilities": random.random(samples).tolist()}
        if kind == "texts":  # of two datasets
            parts = {name: {"accuracy": share / n} for n, name in enumerate(DATASETS, 1)}
            content["datasets"] = parts
        (folder / f"{file}.json").write_text(json.dumps(content))
    log = [
        {
            **{"step": step, "loss": 5 / step + random.random(), "learning_rate": 1 / step},
            **{"samples_per_second": 9 + random.random(), "tflops_per_second": random.random()},
            **{"data_wait": random.random(), "peak_memory_gb_per_process": 1.5},
        }
        for step in range(1, steps + 1)
    ]
    for entry in log if kind == "texts" else ():
        entry |= {f"loss_{name}": n * entry["loss"] for n, name in enumerate(DATASETS, 1)}
    lengths = {"width": 3, "from": [30, 33, 39], "samples": [5, 20, 1]}
    log.append({"step": steps, "train_samples_per_second": 9.5, "train_lengths": lengths})
    state = {"log_history": log, "global_step": steps}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    noise = random.integers(0, 256, (30, 40, 3)).astype("uint8")
    image = Image.fromarray(noise).resize((400, 300))
    images = [[image], [image] * 2, [image.resize((90, 900))] * 8, []]
    records = [
        {
            "id": identifier,
            "conversations": [
                {"images": images[n % 4], "user": f"{NASTY} {n}", "assistant": truths[n]}
            ],
        }
        for n, identifier in enumerate(ids)
    ]
    content = json.loads((folder / "eval_after.json").read_text())
    probabilities = content.get("probabilities", [None] * samples)
    answers = [
        Answer([answer] if isinstance(answer, str) else answer, text, probability)
        for answer, text, probability in zip(
            content["answers_unique"], content["generated_texts_unique"], probabilities, strict=True
        )
    ]
    choices = ["yes", "no"] if kind == "choices" else []
    about = ["from `base`", "with torch 2.14.1"]
    write_report(OutputFolder(folder), about, COMMAND, records, answers, choices)
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    """Folders by kind."""
    folder = tmp_path_factory.mktemp("outputs")
    sizes = dict.fromkeys(KINDS, 40) | {"many": 300}
    return {kind: made(folder / kind, kind, size) for kind, size in sizes.items()}


def text_of(page: Path) -> str:
    """The page without its tags."""
    return html.unescape(re.sub(r"<[^>]*>", " ", page.read_text()))


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize(
    ("kind", "charts"),
    {
        "classes": ["Confusion matrix, after"],
        "texts": ["ANLS of a sample"],
        "choices": ["Confusion matrix, after", "ROC curve", "auroc by step"],
        "many": ["Confusion matrix, after"],
    }.items(),
)
def test_what_is_on_the_page(outputs, kind, charts):
    """Command, versions, all figures and samples, and nothing that a network would be asked for."""
    page = outputs[kind] / "report.html"
    source, text = page.read_text(), text_of(page)
    captions = re.findall("<figcaption>(.*?)</figcaption>", source)
    curves = ["Loss", "Learning rate", "Samples per second", "TFLOP/s per process"]
    curves += ["Share of the time waiting for data", "Peak memory per process, GB"]
    curves += ["accuracy by step", "Length of a training sample"]
    assert sorted(captions) == sorted(curves + charts)
    assert source.count("<svg") == len(captions) and source.count("<article") == 24
    kinds = re.findall('<article class="(wrong|right)"', source)
    assert set(kinds) == {"wrong", "right"} and kinds == sorted(kinds, reverse=True)
    assert COMMAND in text and "with torch 2.14.1" in text
    assert "0.1000 before → 0.7000 after" in text
    assert len(source) < 400_000 and (outputs[kind] / "report.png").stat().st_size < 150_000
    sources = re.findall('src="([^"]*)"', source)
    assert sources and all(each.startswith("data:image/webp;base64,") for each in sources)
    tags = re.sub(r">[^<]*<", "><", source)
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<script", tags)


def test_datasets_of_a_mixture(outputs):
    """A line for each in the figures that are of all, with a legend, and a row in the table."""
    page = outputs["texts"] / "report.html"
    figures = re.findall(
        "<figcaption>(.*?)</figcaption>(.*?)</figure>", page.read_text(), re.DOTALL
    )
    named = {title for title, figure in figures if ">a_dataset_of_a_lo…<" in figure}
    assert named == {"Loss", "accuracy by step"}
    assert all("#059669" in figure for title, figure in figures if title in named), "a third line"
    assert "accuracy, b  0.0500 before → 0.3500 after" in text_of(page)


def test_texts_are_escaped(outputs):
    """Questions, answers, classes and the command are text, whatever is in them."""
    for folder in outputs.values():
        source = (folder / "report.html").read_text()
        assert "<script" not in source and '<img src="http' not in source and "<b>" not in source
        assert NASTY in text_of(folder / "report.html")
    assert "a class of many wo" in text_of(outputs["classes"] / "report.html")


def test_the_command_makes_the_same_page(outputs, tmp_path, capsys):
    """From the folder alone; the dataset is not asked for."""
    folder = shutil.copytree(outputs["choices"], tmp_path / "choices")
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert main([str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
    assert str(folder / "report.html") in capsys.readouterr().out


def test_runs_side_by_side(outputs, tmp_path):
    """Numbers, curves and answers of each, by its name; the first has a different length."""
    other = made(tmp_path / "other", "classes", steps=300, seed=1)
    out = tmp_path / "comparison.html"
    assert main([str(outputs["classes"]), str(other), "--out", str(out)]) == 0
    source, text = out.read_text(), text_of(out)
    assert re.findall(r"Confusion matrix of \S*/(\w+), after", text) == ["classes", "other"]
    assert len(re.findall(r"<td>0.1000 before → 0.7000 after</td>", source)) == 2
    card = re.search("<article.*?</article>", source)[0]
    assert "classes</span>" in card and "other</span>" in card
    loss = re.search("<figcaption>Loss</figcaption>.*?</svg>", source, re.S)[0]
    assert "#3b82f6" in loss and "#d97706" in loss, "a colour for each"
    same = made(tmp_path / "x" / "other", "classes")
    assert main([str(other), str(same), "--out", str(out)]) == 0
    names = re.findall("--key: #[^>]*>([^<]*)", out.read_text())
    assert names[:2] == ["other", "x/other"], "as much of the paths as tells them apart"


def test_a_run_that_has_just_begun(outputs, tmp_path):
    """With its first evaluation alone, or without report.json: what there is, without a gap."""
    (tmp_path / "eval_before.json").write_bytes(
        (outputs["classes"] / "eval_before.json").read_bytes()
    )
    assert main([str(tmp_path)]) == 0
    captions = re.findall("<figcaption>(.*?)</figcaption>", (tmp_path / "report.html").read_text())
    assert captions == ["accuracy by step", "Confusion matrix, before"]


@pytest.mark.parametrize("content", [None, "{", '{"ids": [1]}'])
def test_what_is_no_run(tmp_path, capsys, content):
    """One line that names the folder."""
    if content:
        (tmp_path / "eval_before.json").write_text(content)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}") and error.count("\n") == 1


def test_mistakes_come_first():
    """At most 24 samples, 16 of them mistakes where there are right ones; else all of a kind."""
    right, wrong = Answer(["a"], "a", None), Answer(["a"], "b", None)
    rows = [right, wrong] * 100
    shown = [rows[index] for index in choose(rows)]
    assert shown == [wrong] * 16 + [right] * 8
    assert len(set(choose(rows))) == 24
    assert len(choose([wrong] * 100)) == len(choose([right] * 100)) == 24
    assert choose([right, wrong, right]) == [1, 0, 2]


def test_lengths_as_a_histogram():
    """No sample is lost, and there are never too many bars."""
    lengths = Counter({17: 3, 18: 1, 4000: 2, 900: 5})
    bars = histogram(lengths)["train_lengths"]
    assert sum(bars["samples"]) == 11 and bars["samples"][0] == 4 and bars["width"] * 40 >= 3984
    assert bars["from"][0] == 17 and bars["from"][-1] <= 4000 < bars["from"][-1] + bars["width"]
    assert histogram(Counter({5: 2}))["train_lengths"] == {"width": 1, "from": [5], "samples": [2]}
    assert histogram(Counter()) == {}


# ---------------------------------------------------------------- in a run


def test_a_run_writes_its_report(demo_checkpoint, tmp_path):
    """At every evaluation; the files are the run's, and the card shows the picture."""
    args = arguments(demo_checkpoint, tmp_path, "--max_new_tokens", "2")
    trainer = make_trainer(args, compute_metrics=lambda results: {"accuracy": 0.5})
    trainer.evaluate(file_name="eval_before.json")
    assert "0.5000 before" in text_of(tmp_path / "report.html")
    trainer.train()
    trainer.save_model()
    trainer.evaluate(file_name="eval_after.json")
    text = text_of(tmp_path / "report.html")
    assert "0.5000 before → 0.5000 after" in text and "Length of a training sample" in text
    assert {"report.html", "report.json", "report.png"} <= {*trainer.folder.record["files"]}
    assert "](report.png)" in ModelCard.load(tmp_path / "README.md").text


def test_a_report_that_fails_costs_nothing(demo_checkpoint, tmp_path, monkeypatch, capsys):
    """The result is there, and one line says what was wrong."""

    def fail(*args):
        raise OSError("no font")

    monkeypatch.setattr("phi3v.report.page", fail)
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, "--max_new_tokens", "2"))
    trainer.evaluate(file_name="eval_before.json")
    assert (tmp_path / "eval_before.json").is_file()
    assert not (tmp_path / "report.html").exists()
    assert "No report of this evaluation: no font\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_start_of_a_run_does_not_wait_for_matplotlib():
    """It is imported when the first report is written."""
    code = "import sys, phi3v.training; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- in a browser

# What is wrong with the page in a frame, as a list of texts.
LOOK = """
function look(frame, dark) {
  const page = frame.contentDocument, wrong = [], inside = (a, b) => a.left >= b.left - 1 &&
    a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const say = (what, element) => wrong.push(what + ": " + element.outerHTML.slice(0, 90));
  if (page.documentElement.scrollWidth > frame.clientWidth) wrong.push("wider than the window");
  for (const box of page.querySelectorAll("h1, .table, figure, article, pre, svg")) {
    const place = box.getBoundingClientRect();
    if (place.width < 50 || place.height < 10) say("empty", box);
    if (place.left < 0 || place.right > frame.clientWidth) say("cut off", box);
    // That of several runs can be scrolled.
    const scrolls = box.matches(".table, svg");
    if (box.scrollWidth > box.clientWidth + 1 && !scrolls) say("overflows", box);
  }
  for (const svg of page.querySelectorAll("svg")) {
    const marks = svg.querySelectorAll("path[style*='#'], image").length;
    if (!marks || !svg.querySelector("text")) say("an empty figure", svg);
    for (const text of svg.querySelectorAll("text")) {
      const place = text.getBoundingClientRect();
      if (!inside(place, svg.getBoundingClientRect())) say("cut off", text);
      if (place.height < 7) say("too small to read", text);
      const [red] = getComputedStyle(text).fill.match(/\\d+/g);
      if (dark != red > 128) say("ink like paper", text);
    }
  }
  for (const image of page.querySelectorAll("img")) if (!image.naturalWidth) say("broken", image);
  return [frame.clientWidth, page.querySelectorAll("svg").length, wrong];
}
onload = () => document.body.append("FOUND" + JSON.stringify(
  [...document.querySelectorAll("iframe")].map(frame => look(frame, DARK))) + "END");
"""


def browse(page: str, folder: Path, dark: bool, width: int = 390) -> tuple[list, Image.Image]:
    """
    What is wrong with a page on a phone and on a desktop, and a picture of its top at `width`.

    The page is in frames, because a window of Chromium is never as narrow as a phone.
    """
    wrapper, picture = folder / "frames.html", folder / "picture.png"
    look = LOOK.replace("DARK", json.dumps(dark))
    frames = (
        f'<iframe style="width: {w}px; height: 900px; border: 0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for w in (width, {390: 1280, 1280: 390}[width])
    )
    wrapper.write_text(f'<body style="margin: 0"><script>{look}</script>{"<br>".join(frames)}')
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    ask = {"check": True, "capture_output": True, "timeout": 120}
    dumped = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], **ask).stdout.decode()
    subprocess.run([*command, f"--screenshot={picture}", wrapper.as_uri()], **ask)
    found = json.loads(html.unescape(re.search("FOUND(.*)END", dumped.split("</script>")[1])[1]))
    return found, Image.open(picture).convert("L").crop((0, 0, width, 900))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", [*KINDS, "many", "comparison"])
def test_in_a_browser(outputs, tmp_path, kind, dark):
    """On a phone and a desktop, nothing is cut off, empty, or in the colour of what is below it."""
    if kind == "comparison":
        page = tmp_path / "comparison.html"
        folders = [str(outputs["classes"]), str(outputs["choices"])]
        assert main([*folders, str(made(tmp_path / "c", "classes")), "--out", str(page)]) == 0
    else:
        page = outputs[kind] / "report.html"
    source = page.read_text()
    figures = source.count("<svg")
    found, picture = browse(source, tmp_path, dark, width=1280 if kind == "texts" else 390)
    for width, seen, wrong in found:
        assert seen == figures and not wrong, f"{width} pixels: {wrong}"
    paper, ink = picture.getpixel((2, 2)), np.asarray(picture, int)
    assert paper < 50 if dark else paper > 200
    assert 0.01 < (abs(ink - paper) > 90).mean() < 0.5, "text and lines are seen on it"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_look_notices(outputs, tmp_path):
    """A page with a wide table, a figure that is cut and a broken image is not passed."""
    page = (outputs["texts"] / "report.html").read_text()
    page = page.replace("overflow-wrap: anywhere", "").replace("data:image/webp;base64,", "data:,")
    page = page.replace("white-space: pre-wrap", "white-space: pre").replace(" viewBox=", " x=")
    [(_, _, wrong), _], _ = browse(page, tmp_path, dark=False)
    kinds = {each.partition(":")[0] for each in wrong}
    assert kinds >= {"wider than the window", "cut off", "broken"}, kinds
