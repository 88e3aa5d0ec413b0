"""A checkpoint that earlier code has written: today's resumes it, and goes on with the losses of the unbroken run.

It was made after update 3 of 6. The run lies in its working directory, so that nothing in it names a place.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from packtrain.cli import main
from tests.golden.store import HERE, exit_code, load, save

ARCHIVE = HERE / "checkpoint.tar.gz"
BROKEN_AFTER, UPDATES = 3, 6
RECIPE = f"""\
model:
  config: {{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, tie_word_embeddings: true, max_position_embeddings: 256}}
  tokenizer_vocab_size: 300
data: {{path: packtrain:arithmetic, num_rows: 48, max_length: 128, overflow: drop, eval_size: 4}}
batching: {{strategy: balanced, examples_per_step: 4, max_tokens: 256}}
training: {{output_dir: out, learning_rate: 5e-3, max_steps: {UPDATES}, logging_steps: 1, save_steps: {BROKEN_AFTER},
           report_to: none, use_cpu: true}}
"""


def losses(directory: Path) -> dict[str, list[float]]:
    """Of a finished run: what every update has logged."""
    state = json.loads((directory / f"out/checkpoint-{UPDATES}/trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    return {key: [entry[key] for entry in logs] for key in ("step", "loss", "grad_norm", "learning_rate")}


def pack(directory: Path) -> None:
    """The checkpoint and its recipe as an archive, without owners and times."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with (
        open(ARCHIVE, "wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        archive.add(directory / "recipe.yaml", "recipe.yaml", filter=anonymous)
        archive.add(directory / f"out/checkpoint-{BROKEN_AFTER}", f"out/checkpoint-{BROKEN_AFTER}", filter=anonymous)


def store(directory: Path) -> None:
    (directory / "recipe.yaml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(directory)
    try:
        assert exit_code(main, ["train", "recipe.yaml"]) == 0
    finally:
        os.chdir(before)
    pack(directory)
    save("checkpoint", losses(directory))


@pytest.fixture
def unpacked(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("named", [False, True], ids=["newest", "named"])
def test_a_stored_checkpoint_resumes(unpacked, capsys, named):
    checkpoint = [f"out/checkpoint-{BROKEN_AFTER}"] if named else []
    assert exit_code(main, ["train", "recipe.yaml", "--resume", *checkpoint]) == 0
    said = capsys.readouterr().out
    assert f"resuming after step {BROKEN_AFTER} from checkpoint-{BROKEN_AFTER}" in said
    done = [int(step) for step in re.findall(rf"(\d+)/{UPDATES} +loss", said)]
    assert done == list(range(BROKEN_AFTER + 1, UPDATES + 1)), "updates before it are not done again"
    expected, found = load("checkpoint"), losses(unpacked)
    assert found["step"] == expected["step"] == list(range(1, UPDATES + 1))
    assert found["loss"][:BROKEN_AFTER] == expected["loss"][:BROKEN_AFTER], "these stand in the checkpoint"
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)
    assert found["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-9)


def test_a_stored_checkpoint_of_another_seed_is_refused(unpacked, capsys):
    assert exit_code(main, ["train", "recipe.yaml", "--resume", "--set", "training.seed=1"]) == 2
    assert "was saved by a run with different settings" in capsys.readouterr().err


def test_a_damaged_stored_checkpoint_is_refused(unpacked, capsys):
    """Control: the manifest is read."""
    path = unpacked / f"out/checkpoint-{BROKEN_AFTER}/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert exit_code(main, ["train", "recipe.yaml", "--resume"]) == 2
    assert "skipped checkpoint-3: is damaged" in capsys.readouterr().err
