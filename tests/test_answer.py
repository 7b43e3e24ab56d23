"""Questions to a model: one, a file of them, and a page to chat on."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM

import phi3v.answer
from conftest import REPO
from helpers.launcher import Launcher, torchrun
from phi3v.answer import main
from phi3v.data.formats import UNANSWERED
from phi3v.errors import DataError, RunError
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.training.loading import add_adapters, load_weights, quantization_config

from peft import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENS = 8
SHORT = ("--max_new_tokens", TOKENS)


@pytest.fixture(autouse=True)
def verbosity():
    """What `main` silences is heard again in the next test."""
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(64, 48), (40, 90), (200, 50), (30, 30)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def adapter(demo_checkpoint, tmp_path_factory) -> Path:
    """An adapter's folder as a recipe leaves it, which changes answers, with crops of its own."""
    torch.manual_seed(0)
    base = load_weights(str(demo_checkpoint), torch.float32)
    model = add_adapters(base, LoraConfig(r=4, lora_alpha=64, target_modules=["qkv_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    Phi3VProcessor.from_pretrained(demo_checkpoint, num_crops=4).save_pretrained(folder)
    return folder


def plain_answer(model, processor, question: str, *paths: Path, before: tuple = ()) -> str:
    """As the model card shows it, by transformers alone. Of a chat, `before` are its messages."""
    tags = "".join(f"<|image_{number}|>" for number in range(1 + len(before) // 2, 1 + len(paths)))
    content = f"{tags}\n{question}" if paths else question
    messages = [*before, {"role": "user", "content": content}]
    prompt = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    inputs = processor(prompt, [Image.open(path) for path in paths] or None, return_tensors="pt")
    stop = processor.stop_token_ids
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=stop)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer(*words: object) -> None:
    main([str(word) for word in (*words, *SHORT)])


# ---- One question


def test_the_answer_alone_is_printed(demo_checkpoint, demo_processor, images, capfd):
    """One image, two in the order of their flags, or none: what transformers itself generates."""
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    found = set()
    for names in (["0.png"], ["0.png", "2.png"], ["2.png", "0.png"], []):
        paths = [images / name for name in names]
        expected = plain_answer(model, demo_processor, "What is it?", *paths)
        together = ["--image", *paths] if paths else []
        apart = [word for path in paths for word in ("--image", path)]
        for words in (
            [*together, "What is it?"],
            ["What is it?", *together],
            ["What is it?", *apart],
        ):
            capfd.readouterr()
            answer(demo_checkpoint, *words)
            assert capfd.readouterr() == (f"{expected}\n", "")
        found.add(expected)
    assert len(found) >= 3, "answers should tell prompts apart"


@pytest.mark.slow
def test_libraries_are_silent(launcher: Launcher, demo_checkpoint, demo_processor, images):
    """Neither stdout nor stderr has anything else, from the first import on."""
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    expected = plain_answer(model, demo_processor, "What is it?", images / "0.png")
    words = ("--image", images / "0.png", "What is it?", *SHORT)
    said = launcher.run("-m", "phi3v.answer", demo_checkpoint, *words, cwd=REPO)
    assert said == f"{expected}\n"


def test_an_adapter_finds_its_base(
    demo_checkpoint, demo_processor, adapter, images, tmp_path, capsys
):
    """By the name in its config, or by --base where that has moved. Its own processor is taken."""
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    own = Phi3VProcessor.from_pretrained(adapter)
    asked = ("What is it?", images / "2.png")
    plain = plain_answer(model, own, *asked)
    model.load_adapter(adapter)
    expected = plain_answer(model, own, *asked)
    assert expected not in (plain, plain_answer(model, demo_processor, *asked))
    question = ("--image", images / "2.png", "What is it?")
    answer(adapter, *question)
    assert capsys.readouterr().out == f"{expected}\n"

    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "none")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"the base of {moved} \(another one: --base\): {tmp_path}"):
        answer(moved, *question)
    answer(moved, "--base", demo_checkpoint, *question)
    assert capsys.readouterr().out == f"{expected}\n"


def test_four_bits(demo_checkpoint, demo_processor, images, capsys):
    pytest.importorskip("bitsandbytes")
    model = load_weights(
        str(demo_checkpoint),
        torch.float32,
        quantization_config=quantization_config(torch.float32),
        device_map={"": "cpu"},
    )
    expected = plain_answer(model, demo_processor, "What is it?", images / "0.png")
    answer(demo_checkpoint, "--load_in_4bit", "--image", images / "0.png", "What is it?")
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",)], ids=["16 bits", "4 bits"])
def test_precisions_of_a_gpu(adapter, images, monkeypatch, capsys, dtype, flags):
    """All that meets, pixels and adapter included, fits without autocast. (On a CPU, here.)"""
    if flags:
        pytest.importorskip("bitsandbytes")
    loaded, load = [], phi3v.answer.load_model
    monkeypatch.setattr(phi3v.answer, "precision", lambda device: dtype)
    monkeypatch.setattr(
        phi3v.answer, "load_model", lambda *args: loaded.append(load(*args)) or loaded[0]
    )
    answer(adapter, *flags, "--image", images / "0.png", "What is it?")
    found = {tensor.dtype for tensor in loaded[0].parameters()}
    assert found == ({dtype, torch.uint8} if flags else {dtype})
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of QUESTION, --file and --serve"),
        (("What?", "--serve"), "give one of QUESTION, --file and --serve"),
        (("What?", "--image", "none.png"), "--image 'none.png' is no file"),
        (("--image", "none.png", "What?"), "--image 'none.png' is no file"),
        (("--image", "none.png"), "give one of QUESTION, --file and --serve"),
        (("--image", __file__, __file__), "give one of QUESTION, --file and --serve"),
        (("--serve", "--image", __file__), "--image belongs to a QUESTION"),
        (("--file", __file__), "--file and --output belong together"),
        (
            ("--file", "q", "--output", "a", "--image_dir", "none"),
            "--image_dir 'none' is no folder",
        ),
        (("What?", "--num_crops", "17"), "must be at least 1 and at most 16"),
        (("What?", "--use_flash_attention"), "needs a GPU, and none is visible"),
    ],
)
def test_wrong_flags(demo_checkpoint, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main([str(demo_checkpoint), *words])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_missing_packages(demo_checkpoint, capsys, monkeypatch):
    """What is optional is named, with what to type."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words in (("--serve",), ("What?", "--load_in_4bit")):
        with pytest.raises(SystemExit):
            main([str(demo_checkpoint), *words])
    said = capsys.readouterr().err
    assert 'pip install "gradio>=6"' in said and "pip install bitsandbytes" in said


def test_errors_come_before_the_model(demo_checkpoint, adapter, images, tmp_path, monkeypatch):
    """MODEL, a question or an image that is wrong: nobody waits for weights to hear of it."""
    monkeypatch.setattr(phi3v.answer, "load_weights", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(RunError, match="^MODEL nowhere/at_all/: there is no such folder"):
        answer("nowhere/at_all/", "What?")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(RunError, match=r"pickled: it holds no adapter_model\.safetensors"):
        answer(pickled, "What?")
    with pytest.raises(DataError, match=r"contains '<\|user\|>', which would be read as a control"):
        answer(demo_checkpoint, "<|user|>")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="text.png: it is no image of a known format"):
        answer(demo_checkpoint, "--image", tmp_path / "text.png", "What?")


# ---- A file of questions


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def many(count: int) -> list[dict]:
    """Questions of different lengths, the number of images included."""
    questions = []
    for number in range(count):
        shown = [f"{(number + other) % 4}.png" for other in range(number % 3)]
        text = " ".join(["What is it?"] * (number * 7 % 5 + 1))
        questions.append({"id": f"q{number}", "image": shown, "question": text})
    return questions


def test_a_file_of_every_form(demo_checkpoint, demo_processor, images, tmp_path):
    """Answers come in the order of the questions, under their ids. Answers that are there, of a
    dataset, are not shown to the model; earlier turns are."""
    turn = {"images": ["0.png"], "user": "What is it?"}
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    file = write(
        tmp_path / "questions.jsonl",
        {"question": "What is it?", "image": "0.png"},
        {"question": "A longer one: what is it?", "images": ["0.png", "1.png"], "id": 7},
        {"question": "None?", "image": None, "answer": "Yes"},
        {"id": "ours", "conversations": [turn]},
        {"id": "ours, answered", "conversations": [{**turn, "assistant": "A cat"}]},
        {"messages": [{"role": "user", "content": parts}], "images": ["0.png"]},
        {
            "id": "llava",
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
        },
        {"id": "turns", "conversations": [{**turn, "assistant": "No"}, {"user": "Sure?"}]},
    )
    output = tmp_path / "new" / "answers.jsonl"
    answer(demo_checkpoint, "--file", file, "--image_dir", images, "--output", output)
    found = read(output)
    ids = ["question-1", "7", "question-3", "ours", "ours, answered", "messages-6", "llava"]
    assert [line["id"] for line in found] == [*ids, "turns"]
    assert found[1]["question"] == "A longer one: what is it?"
    assert found[7]["question"] == "Sure?"
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    paths = [images / "0.png", images / "1.png"]
    alike = plain_answer(model, demo_processor, "What is it?", paths[0])
    expected = {index: alike for index in (0, 3, 4)}
    expected[1] = plain_answer(model, demo_processor, "A longer one: what is it?", *paths)
    expected[2] = plain_answer(model, demo_processor, "None?")
    assert {index: found[index]["answer"] for index in expected} == expected
    assert {line["model"] for line in found} == {str(demo_checkpoint)}
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_what_is_complete_is_kept(demo_checkpoint, adapter, images, tmp_path, monkeypatch, capsys):
    """The same command again changes nothing; another model or question is refused."""
    file = write(images / "complete.jsonl", *many(3))  # image paths are relative to its folder
    words = (demo_checkpoint, "--file", file, "--output", tmp_path / "a.jsonl")
    answer(*words)
    content = (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(phi3v.answer, "load_weights", lambda *_, **__: pytest.fail("it was loaded"))
    answer(*words)
    assert "a.jsonl is complete: 3 answers" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"a.jsonl, line 1: model is not .*delete it"):
        answer(adapter, *words[1:])
    write(file, *many(2), {**many(3)[2], "question": "Another?"})
    with pytest.raises(RunError, match=r"a.jsonl, line 3: question is not 'Another\?'"):
        answer(*words)
    write(file, *many(4))
    with pytest.raises(RunError, match="3 lines for 4 questions"):
        answer(*words)
    with pytest.raises(RunError, match="cannot be written: .*Is a directory"):
        answer(*words[:-1], tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == content


def test_wrong_questions(demo_checkpoint, images, tmp_path):
    """The file, the line and the field; or without them, and the others are answered."""
    wrong = [
        ({"question": 5}, r"line 2: conversations\[0\].user must be a string"),
        ({"question": "What?", "image": "none.png"}, "line 2: .*'none.png' cannot be read"),
        ({"question": "What?", "picture": "0.png"}, "line 2: .*unknown: 'picture'"),
        ({"id": "q0", "question": "What?"}, "line 2: id 'q0' is that of line 1 too"),
        ({"id": "x", "conversations": []}, "line 2: conversations is empty"),
    ]
    words = (demo_checkpoint, "--image_dir", images, "--output", tmp_path / "a.jsonl", "--file")
    for line, message in wrong:
        file = write(tmp_path / "q.jsonl", many(1)[0], line, many(3)[2])
        with pytest.raises(DataError, match=message):
            answer(*words, file)
    answer(*words, file, "--skip_bad_samples")
    assert [line["id"] for line in read(tmp_path / "a.jsonl")] == ["q0", "q2"]


# Batches take long, so that it can be killed between them.
SLOW = """
import sys, runpy, time
sys.path.insert(0, {repo!r})
from phi3v import Phi3VForCausalLM
generate = Phi3VForCausalLM.generate
def slow(self, **inputs):
    time.sleep(0.1)
    return generate(self, **inputs)
Phi3VForCausalLM.generate = slow
runpy.run_module("phi3v.answer", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_two_processes_and_a_kill(launcher: Launcher, demo_checkpoint, images, tmp_path):
    """Two ranks write what one does. A rank that is killed and restarted loses a chunk at most."""
    file, alone = write(tmp_path / "q.jsonl", *many(70)), tmp_path / "alone.jsonl"
    flags = (*("--file", file, "--image_dir", images, "--batch_size", 1), *SHORT, "--output")
    answer(demo_checkpoint, *flags, alone)
    script, output = tmp_path / "slow.py", tmp_path / "two.jsonl"
    script.write_text(SLOW.format(repo=str(REPO)))
    words = (script, demo_checkpoint, *flags, output)
    run, part = launcher.start(*torchrun(2, *words, restarts=1)), Path(f"{output}.part")
    while not (part.exists() and part.stat().st_size):
        assert run.poll() is None, run.text()
        time.sleep(0.01)
    assert len(read(part)) == 32, "16 batches of two ranks"
    assert not output.exists()
    run.children()[1].kill()
    said = run.finish()
    assert run.returncode == 0, said
    assert "two.jsonl.part has 32 of 70 answers. Going on." in said
    assert "70/70" in said  # the bar, which goes on at 32
    assert output.read_bytes() == alone.read_bytes() and not part.exists()


def test_a_half_written_line(demo_checkpoint, images, tmp_path, monkeypatch):
    """It is answered again; whole lines are not. A file that was whole but not renamed is."""
    file, output = write(tmp_path / "q.jsonl", *many(6)), tmp_path / "a.jsonl"
    words = (demo_checkpoint, "--file", file, "--image_dir", images, "--output", output)
    answer(*words)
    content = output.read_bytes()
    lines = content.splitlines(keepends=True)
    asked, generate = [], phi3v.answer.generate
    monkeypatch.setattr(
        phi3v.answer,
        "generate",
        lambda model, processor, some, *rest, **options: (
            asked.extend(record["id"] for record in some)
            or generate(model, processor, some, *rest, **options)
        ),
    )
    for left, due in ((b"".join(lines[:4]) + lines[4][:9], ["q4", "q5"]), (content, [])):
        output.rename(f"{output}.part")
        Path(f"{output}.part").write_bytes(left)
        asked.clear()
        answer(*words)
        assert asked == due
        assert output.read_bytes() == content


# ---- The page


def test_turns_of_a_chat():
    """An image stays with the question that it came with. What was not answered is left out: it
    would fail again."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    from phi3v.chat_page import FAILED, to_turns

    def said(role: str, text: str, *files: str, **more) -> dict:
        shown = [{"type": "file", "file": {"path": path}} for path in files]
        return {"role": role, "content": [*shown, {"type": "text", "text": text}], **more}

    history = [
        said("user", "Look", "/a.png", "/b.png"),
        said("assistant", "A cat"),
        said("user", "<|user|>", "/text.png"),
        said("assistant", "No image", metadata={"title": FAILED}),
        said("user", "Stopped"),
        said("assistant", ""),
        said("user", "Sure?"),
        said("assistant", "Yes", metadata=None),
    ]
    assert to_turns({"text": "And it?", "files": ["/c.png"]}, history) == [
        {"images": ["/a.png", "/b.png"], "user": "Look", "assistant": "A cat"},
        {"images": [], "user": "Sure?", "assistant": "Yes"},
        {"images": ["/c.png"], "user": "And it?", "assistant": UNANSWERED},
    ]


@pytest.fixture
def browser_page():
    """A page of a headless Chromium."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        yield page
        browser.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(page, text: str) -> None:
    box = page.get_by_role("textbox")
    box.fill(text)
    box.press("Enter")


@pytest.mark.slow
def test_a_chat_in_the_browser(
    launcher: Launcher, demo_checkpoint, demo_processor, images, browser_page, free_port
):
    """
    Images and questions in several turns get the model's answers, from this machine alone. A wrong
    question is told, and the chat goes on.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    public = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    words = ("-m", "phi3v.answer", demo_checkpoint, "--serve", "--port", free_port, *SHORT)
    run = launcher.start(*words, env=public, cwd=REPO)
    while "The chat page is on" not in run.text():
        assert run.poll() is None, run.text()
        time.sleep(0.05)
    listening = {c.laddr for c in psutil.Process(run.pid).net_connections() if not c.raddr}
    assert listening == {("127.0.0.1", free_port)}
    hosts = set()
    browser_page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    browser_page.goto(f"http://127.0.0.1:{free_port}")
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    expected = plain_answer(model, demo_processor, "What is it?", images / "0.png")
    browser_page.set_input_files("input[type=file]", [images / "0.png"])
    browser_page.get_by_label("Remove file").wait_for()  # it is uploaded
    send(browser_page, "What is it?")
    bot = browser_page.locator(".bot.message")
    playwright.expect(bot.last).to_have_text(expected.strip())
    send(browser_page, "<|user|>")
    playwright.expect(bot.last).to_contain_text("which would be read as a control token")
    browser_page.set_input_files("input[type=file]", [images / "1.png"])
    browser_page.get_by_label("Remove file").wait_for()
    send(browser_page, "And this?")
    playwright.expect(bot).to_have_count(3)
    before = (
        {"role": "user", "content": "<|image_1|>\nWhat is it?"},
        {"role": "assistant", "content": expected},
    )
    paths = (images / "0.png", images / "1.png")
    expected = plain_answer(model, demo_processor, "And this?", *paths, before=before)
    playwright.expect(bot.last).to_have_text(expected.strip())
    assert hosts == {f"127.0.0.1:{free_port}"}
    run.kill()


@pytest.mark.slow
def test_a_chat_that_is_stopped(demo_processor, browser_page, free_port):
    """An answer is shown as it grows. Stopped, it is left at the next token, and the chat goes on
    with what was said as a turn."""
    from phi3v.chat_page import chat_page

    playwright, asked, left = pytest.importorskip("playwright.sync_api"), [], threading.Event()

    def answer_slowly(turns, stream) -> str:
        asked.append(turns)
        if len(turns) == 2:
            return "Done"
        stream.put(torch.tensor([[1]]))  # the prompt
        try:
            for token in demo_processor.tokenizer(
                "three " * 500, add_special_tokens=False
            ).input_ids:
                stream.put(torch.tensor([token]))
                time.sleep(0.02)
        except InterruptedError:
            left.set()
            raise

    page = chat_page(answer_slowly, demo_processor.tokenizer, "model")
    page.launch(
        server_name="127.0.0.1", server_port=free_port, quiet=True, prevent_thread_lock=True
    )
    try:
        browser_page.goto(f"http://127.0.0.1:{free_port}")
        send(browser_page, "Count")
        bot = browser_page.locator(".bot.message")
        playwright.expect(bot.last).to_contain_text("three three three")
        browser_page.locator(".stop-button").click()
        assert left.wait(20)
        send(browser_page, "And now?")
        playwright.expect(bot.last).to_have_text("Done")
    finally:
        page.close()
    assert asked[1][0]["user"] == "Count" and asked[1][0]["assistant"].startswith("three three")
