"""The model card, and the hub: a stand-in on loopback, and its cache on disk."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from helpers.trainers import SETTINGS, arguments, make_trainer
from phi3v.errors import RunError
from phi3v.training import load_processor, trainer_arguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What a push asks of the hub. `server.files` are those of all commits."""

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        server, url = self.server, f"http://127.0.0.1:{self.server.server_port}/me/model"
        server.requests.append(self.path)
        status, answer = 200, {"errors": [], "warnings": []}  # of api/validate-yaml
        if server.refuses or self.headers["Authorization"] != "Bearer secret":
            status, answer = 403, {"error": "You don't have the rights"}
        elif self.path == "/api/repos/create":
            server.created = json.loads(body)
            answer = {"url": url, "name": "me/model"}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": path, **modes} for path in paths]}
        elif "/commit/" in self.path:
            lines = map(json.loads, body.decode().splitlines())
            files = [line["value"] for line in lines if line["key"] == "file"]
            server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.created, server.files, server.refuses = [], None, {}, False
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("HF_TOKEN", "secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(args) -> None:
    """What a recipe's main() does."""
    trainer = make_trainer(args, compute_metrics=lambda results: {"accuracy": len(results) / 8})
    trainer.evaluate(file_name="eval_before.json")
    trainer.train()
    trainer.save_model()
    trainer.evaluate(file_name="eval_after.json")
    if args.merge_lora:
        trainer.merge_adapter()


PUSH = ("--push_to_hub", "--hub_model_id", "me/model", "--max_new_tokens", "2")
LORA = ("--use_lora", "--lora_rank", "2")


def test_a_push_is_the_finished_folder(hub, demo_checkpoint, tmp_path):
    """All that the run wrote, its card with the metrics included; no checkpoint, nothing else."""
    (tmp_path / "notes.txt").write_text("mine")
    flags = (*PUSH, "--hub_private_repo", "true", "--save_steps", "1", "--batch_size", "1", *LORA)
    run(arguments(demo_checkpoint, tmp_path, *flags, "--merge_lora"))
    assert (hub.created["name"], hub.created["visibility"]) == ("model", "private")
    assert any(path.is_dir() for path in tmp_path.glob("checkpoint-*"))
    written = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
        and path.relative_to(tmp_path).parts[0][:10] not in (".phi3v", "checkpoint")
    }
    del written["notes.txt"]
    assert hub.files == written
    assert hub.files.keys() >= {"adapter_model.safetensors", "merged/model.safetensors"}
    assert hub.files.keys() >= {"README.md", "eval_after.json", "tokenizer.json"}
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-text-to-text"
    assert "| accuracy | 0.3750 | 0.3750 |" in card.text and "# model" in card.text
    pushes = len(hub.requests)
    with pytest.raises(SystemExit):
        trainer_arguments(
            arguments(
                demo_checkpoint, tmp_path, *flags, "--merge_lora", "--resume_from_checkpoint"
            ),
            **SETTINGS,
        )
    assert len(hub.requests) > pushes, "a finished run pushes again"


def test_a_push_that_fails_costs_nothing(hub, demo_checkpoint, tmp_path):
    """The folder is whole, and the message says how to push it."""
    args = arguments(demo_checkpoint, tmp_path, *PUSH, *LORA)
    trainer = make_trainer(args)
    trainer.train()
    trainer.save_model()
    hub.refuses = True
    with pytest.raises(
        RunError, match="--push_to_hub me/model: .*resume_from_checkpoint pushes it"
    ):
        trainer.evaluate(file_name="eval_after.json")
    assert not hub.files and (tmp_path / "eval_after.json").is_file()
    assert "trainer_state.json" in trainer.folder.record["files"]


@pytest.mark.parametrize("why", ["no token", "no right", "offline"])
def test_what_cannot_be_pushed_is_known_at_the_start(hub, tmp_path, monkeypatch, why):
    """One line, before model and data are looked at."""
    if why == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif why == "no right":
        hub.refuses = True
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = {"no token": "no token found", "no right": "403", "offline": "offline mode"}[why]
    with pytest.raises(RunError, match=f"^--push_to_hub: .*{said}") as raised:
        trainer_arguments(arguments("unused", tmp_path / "output", *PUSH))
    assert "\n" not in str(raised.value)
    assert "/api/repos/create" in hub.requests or why != "no right"


@pytest.fixture
def cached(demo_checkpoint, tmp_path, monkeypatch) -> str:
    """A hub id in a cache on disk, whose tag v1 is a commit, and whose newest state is broken."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    (repository / "refs" / "v1").write_text(COMMIT)
    shutil.copytree(demo_checkpoint, repository / "snapshots" / COMMIT)
    (repository / "snapshots" / ("f" * 40)).mkdir()
    return "someone/model"


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_pinned(cached, tmp_path, revision):
    """Processor, weights, merge and adapter are of this commit, which stands in the card."""
    folder = tmp_path / "output"
    flags = ("--model_revision", revision, *LORA, "--merge_lora", "--max_new_tokens", "2")
    run(arguments(cached, folder, *flags))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == cached and COMMIT in card.text
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (cached, COMMIT)
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "_commit_hash" not in (folder / "merged" / "config.json").read_text()
    with pytest.raises(RunError, match="--model_name_or_path someone/model: no config.json"):
        load_processor(arguments(cached, folder / "other"))


def test_revisions_that_are_not_there(cached, demo_checkpoint, tmp_path):
    with pytest.raises(RunError, match="someone/model --model_revision v2: .*the hub has no such"):
        load_processor(arguments(cached, tmp_path, "--model_revision", "v2"))
    with pytest.raises(RunError, match="is a folder, and --model_revision v1 is for hub ids"):
        load_processor(arguments(demo_checkpoint, tmp_path, "--model_revision", "v1"))


def test_a_card_of_full_finetuning(demo_checkpoint, tmp_path, monkeypatch):
    """A folder is no base model of the hub's; the command and the versions stand there."""
    monkeypatch.setattr("sys.argv", ["/x/recipe.py", "--batch_size", "2", "--output_dir", "a b"])
    run(arguments(demo_checkpoint, tmp_path, "--max_new_tokens", "2"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.library_name == "transformers"
    assert card.data.metrics == ["accuracy"] and card.data.tags == ["phi3_v"]
    assert "python recipe.py --batch_size 2 --output_dir 'a b'\n" in card.text
    assert f"huggingface_hub {huggingface_hub.__version__}" in card.text
