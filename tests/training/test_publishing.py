"""`packtrain push`: what is listed is what goes up, nothing of this machine goes with it, and what fails is said."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from packtrain.cli import main
from packtrain.modeling.tokenizer import train_bpe
from packtrain.recipe.reader import load_recipe
from tests.tiny import tiny_model

RECIPE = """
model: {model_name_or_path: BASE}
data: {path: ROWS}
training: {output_dir: RUN, run_name: "https://me:a_secret@host/x", deepspeed: ZERO}
"""


class Hub(HTTPServer):
    """The few answers of the Hub that an upload needs; keeps what it is sent."""

    def __init__(self, *, private: bool = True, status: int = 200):
        self.private, self.status = private, status
        self.created: list[dict] = []
        self.uploaded: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):  # facts about the repository
        self._say({"id": "me/model", "private": self.server.private, "siblings": [], "tags": [], "downloads": 0})

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(sent))
            self._say({"url": f"{self.url}/me/model", "name": "me/model"})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            self._say({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say({"commitUrl": f"{self.url}/me/model/commit/1", "commitOid": "1", "success": True})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _say(self, answer: dict) -> None:
        body = json.dumps(answer if self.server.status == 200 else {"error": "no"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """Starts a hub of this machine, which the client is told is the Hub."""
    started: list[Hub] = []

    def start(**answers) -> Hub:
        server = Hub(**answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run as training leaves it, with what must stay next to it."""
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    tokenizer = train_bpe(["2+2? 4"] * 20, vocab_size=300)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "README.md").write_text("---\ntags: [packtrain]\n---\n# tiny\n")
    (model / "training_args.bin").write_bytes(b"pickle")
    (run / "checkpoint-3").mkdir()
    for name in ("trainer_state.json", "config.json"):
        (run / "checkpoint-3" / name).write_text("{}")
    places = {"BASE": tmp_path / "base", "ROWS": tmp_path / "rows.jsonl", "RUN": run, "ZERO": tmp_path / "zero.json"}
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "2+2? 4"}\n')
    text = RECIPE
    for name, place in places.items():
        text = text.replace(name, str(place))
    (tmp_path / "tiny.yaml").write_text(text)
    sections = {name: part for name, part in load_recipe(tmp_path / "tiny.yaml").to_dict().items() if part}
    (run / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return run


def push(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["push", *map(str, words)])
    return ended.value.code or 0, *capsys.readouterr()


def is_private(asked: dict) -> bool:
    """Whether a repository is asked for as a private one, in the words of any release of the client."""
    return bool(asked.get("private")) or asked.get("visibility") == "private"


EXPECTED = {"README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"}


def test_what_is_listed_is_what_is_uploaded(folder, hub, capsys):
    server = hub()
    code, listed, _ = push(capsys, folder, "me/model", "--private", "--dry-run")
    assert code == 0 and "would be uploaded to me/model (private)" in listed
    assert not server.created and not server.uploaded
    code, said, _ = push(capsys, folder, "me/model", "--private")
    assert code == 0 and "/me/model/commit/1" in said
    assert server.created[0]["name"] == "model" and is_private(server.created[0])
    names = {line.split()[0] for line in listed.splitlines()[:-1]}
    assert set(server.uploaded) == names and EXPECTED <= names and not any("training_args" in name for name in names)
    for name in names - {"recipe.yaml"}:
        assert server.uploaded[name] == (folder / "model" / name).read_bytes()
    everything = b"".join(server.uploaded.values())
    assert str(folder.parent).encode() not in everything and b"a_secret" not in everything
    recipe = yaml.safe_load(server.uploaded["recipe.yaml"])
    assert recipe["data"]["path"] == "rows.jsonl" and recipe["model"]["model_name_or_path"] == "base"
    assert recipe["training"]["deepspeed"] == "zero.json"
    stored = (folder / "recipe.yaml").read_text()  # control
    assert str(folder.parent) in stored and "a_secret" in stored


def test_a_public_repository_is_not_taken_for_a_private_one(folder, hub, capsys):
    server = hub(private=False)
    code, _, said = push(capsys, folder, "me/model", "--private")
    assert code == 2 and "exists already, and is public" in said and not server.uploaded
    code, *_ = push(capsys, folder / "model", "me/model")  # control: asked for public, by the folder of the model
    assert code == 0 and server.uploaded and not is_private(server.created[-1])


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not accept the token"), (403, "may not write"), (500, "did not take the upload")],
)
def test_what_the_hub_refuses_is_said(folder, hub, capsys, status, message):
    server = hub(status=status)
    code, _, said = push(capsys, folder, "me/model")
    assert code == 2 and message in said and "Traceback" not in said and not server.uploaded


@pytest.mark.parametrize("what", ["offline", "no token", "nobody there", "no name"])
def test_what_an_upload_needs_is_said(folder, hub, capsys, monkeypatch, what):
    server, repo = hub(), "me/model"
    if what == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        message = "HF_HUB_OFFLINE is set"
    elif what == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no token"))
        message = "there is no token of the Hub"
    elif what == "nobody there":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        message = "can't be reached"
    else:
        repo, message = "me/my model", "is no name of a repository"
    code, _, said = push(capsys, folder, repo)
    assert code == 2 and message in said and "fix: " in said and not server.uploaded
    assert push(capsys, folder, repo, "--dry-run")[0] == 0


def test_what_others_could_not_load_is_refused(folder, capsys):
    code, _, said = push(capsys, folder / "checkpoint-3", "me/model", "--dry-run")
    assert code == 2 and "is a checkpoint" in said
    code, _, said = push(capsys, "org/name", "me/model", "--dry-run")
    assert code == 2 and "is not a folder" in said
    for command in (
        ["push", str(folder.parent / "base"), "me/model"],
        ["generate", str(folder.parent / "base"), "--prompt", "x"],
    ):
        with pytest.raises(SystemExit) as ended:  # an empty folder, as of a run that never began
            main(command)
        assert ended.value.code == 2 and "holds neither a run nor a model" in capsys.readouterr().err
    adapter = folder.parent / "adapter"
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    for base, refused in ((str(folder), True), (None, True), ("org/name", False)):
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(adapter)
        code, _, said = push(capsys, adapter, "me/model", "--dry-run")
        assert (code == 2 and "which nobody else has" in said and "packtrain merge" in said) == refused
