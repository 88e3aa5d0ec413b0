"""Runs over streamed rows: the updates of counted rows, and after a resume those of an unbroken run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from packtrain.cli import main
from packtrain.errors import CheckpointError, DataError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives.task import load_examples
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from packtrain.training.trainer import PackTrainer

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
    attention_dropout: 0.1}
  tokenizer_name_or_path: tokenizer
data: {path: rows.jsonl, max_length: 64, overflow: drop, on_bad_row: skip, streaming: true, buffer_size: 12}
batching: {examples_per_step: 4, max_tokens: 128}
training: {output_dir: run, use_cpu: true, max_steps: 14, learning_rate: 1e-2, logging_steps: 1, save_steps: 1,
  report_to: none}
"""
ROWS = 48  # 44 examples, 11 updates


class Logged(PackTrainer):
    """Keeps what every update logs."""

    logs: list[dict] = []

    def log(self, logs, *args):
        super().log(logs, *args)
        if "loss" in logs:
            Logged.logs.append(dict(self.state.log_history[-1]))


def lines(count: int = ROWS) -> list[str]:
    rows = [{"prompt": f"{n} and {n}? ", "completion": f"{2 * n} " * (1 + n % 5)} for n in range(count)]
    texts = [json.dumps(row) for row in rows]
    texts[7], texts[30] = "{", '{"prompt": 1}'
    texts[11] = texts[40] = json.dumps({"prompt": "long? ", "completion": "very " * 99})
    return texts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines()) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    train_bpe(["0 1 2 3 4 5 6 7 8 9 and long? very another row"] * 9, vocab_size=290).save_pretrained("tokenizer")
    return tmp_path


def run(output_dir: str, *overrides: str, **options) -> tuple[list[float], bytes, dict]:
    """Returns the losses, the weights and the summary's report of the rows."""
    Logged.logs = []
    recipe = load_recipe("recipe.yaml", [f"training.output_dir={output_dir}", *overrides])
    summary = train(recipe, trainer_class=Logged, **options)
    weights = Path(output_dir, "model/model.safetensors").read_bytes()
    return [entry["loss"] for entry in Logged.logs], weights, json.loads(json.dumps(summary.data))


@pytest.mark.ci
@pytest.mark.slow
def test_rows_of_one_block_are_trained_as_if_they_were_counted(folder):
    """Bitwise, over the end of the rows, with the same counts; control: blocks of 12 give other updates after the first."""
    same = ["training.gradient_accumulation_steps=2"]
    streamed, weights, report = run("streamed", "buffer_size=1000", *same)
    epochs = [entry["epoch"] for entry in Logged.logs]
    assert [entry["rows_read"] for entry in Logged.logs] == [ROWS] * 14
    assert Logged.logs[-1]["bad_rows"] == 2 and Logged.logs[-1]["tokens_lost"] == report["tokens_lost"] > 0
    counted, expected, told = run("counted", "streaming=false", "buffer_size=null", *same)
    assert streamed == counted and weights == expected
    assert epochs[:11] == [0] * 11 and epochs[11:] == [entry["epoch"] for entry in Logged.logs[11:]]
    for name in told:
        if name not in ("files", "notes"):
            assert report[name] == told[name], name
    assert report["notes"][1:] == told["notes"]
    in_blocks, _, told = run("in_blocks", *same)
    assert in_blocks != counted and told == report


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_resumes_bitwise_and_refuses_other_rows(folder):
    """In the middle of a block, and in the second epoch; rows that nobody has read yet may change."""
    losses, weights, report = run("whole")
    assert 0 < report["rows"] == ROWS and report["examples"] == 44
    for step in (4, 12):
        shutil.copytree(f"whole/checkpoint-{step}", f"from-{step}/checkpoint-{step}")
        again, same, counts = run(f"from-{step}", resume=True)
        assert again == losses[step:] and same == weights and counts == report
    state = json.loads(Path("whole/checkpoint-4/packtrain_manifest.json").read_text())["stream"]
    assert state["start"]["block"] == 1 and state["start"]["row"] == 14 and state["start"]["tally"]["bad_rows"] == 1

    def resumed(changed: int, step: int = 7) -> list[float]:
        texts = lines()
        texts[changed] = json.dumps({"prompt": "another? ", "completion": "row"})
        Path("rows.jsonl").write_text("\n".join(texts) + "\n")
        return run("whole", resume=f"whole/checkpoint-{step}")[0]

    with pytest.raises(CheckpointError, match="the tokenised examples"):  # of the first block
        resumed(0)
    for row in (14, 28):  # of a block before, and of the one that it is in the middle of
        with pytest.raises(CheckpointError, match="data.path: was saved by a run that has read other rows"):
            resumed(row)
    again = resumed(44)
    assert again[:2] == losses[7:9] and again != losses[7:]


@pytest.mark.ci
@pytest.mark.slow
def test_a_row_that_ends_a_run_can_be_left_out_by_the_one_that_resumes(folder):
    """Where `overflow` was an error, no row before was too long; control: other choices are other examples."""
    texts = [text for n, text in enumerate(lines()) if n != 11]  # the first long row is number 39
    Path("rows.jsonl").write_text("\n".join(texts) + "\n")
    with pytest.raises(DataError, match=r"data.overflow: 1 of .*\n    rows.jsonl, line 40: \d+ tokens"):
        run("run", "overflow=error")
    with pytest.raises(
        CheckpointError, match="data.overflow: was 'error', is now 'drop'\n    fix: .* accept them with"
    ):
        run("run", resume=True)
    losses, weights, report = run("run", resume=True, allow_changes=True)
    whole, expected, told = run("whole")
    assert losses == whole[-len(losses) :] and len(losses) < 14 and weights == expected and report == told
    with pytest.raises(CheckpointError, match="data.overflow: was 'drop', is now 'truncate'\n    .*fix: undo these"):
        run("whole", "overflow=truncate", resume="whole/checkpoint-9", allow_changes=True)


def test_a_run_over_a_source_without_an_end_reads_what_it_needs(folder):
    """A trillion rows are named; control: two blocks and the one that is read ahead are read, not more."""
    more = ["max_steps=5", "data.max_length=1024", "max_tokens=1024"]
    losses, _, report = run("run", "data.path=packtrain:arithmetic", "num_rows=1000000000000", *more)
    assert len(losses) == 5 and 24 <= report["rows"] < 100


@pytest.mark.ci
@pytest.mark.slow
def test_two_ranks_do_what_one_does_and_resume_its_checkpoint(folder):
    def losses(output_dir: str, ranks: int, *more: str) -> list[float]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "packtrain", "train", "recipe.yaml"]
            + [
                word
                for pair in (f"output_dir={output_dir}", "model.config.attention_dropout=0")
                for word in ("--set", pair)
            ]
            + [*more],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads(Path(output_dir, "checkpoint-14/trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in log if "loss" in entry]

    one = losses("one", 1)
    np.testing.assert_allclose(losses("two", 2), one, rtol=1e-5)
    shutil.copytree("one/checkpoint-5", "both/checkpoint-5")
    np.testing.assert_allclose(losses("both", 2, "--resume"), one, rtol=1e-5)


def test_verbs_show_the_first_block_or_say_that_they_need_counted_rows(folder, capsys):
    def said(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words])
        done = capsys.readouterr()
        return ended.value.code or 0, done.out + done.err

    code, text = said("plan", "recipe.yaml", "--all")
    assert code == 0 and "the first block of them stands for all" in text and "streamed from rows.jsonl" in text
    assert "12 examples" in text and "bfd cannot be used: 'bfd' packs the whole epoch, and streamed rows are" in text
    code, text = said("show", "recipe.yaml", "--step", "4")  # in the second block
    assert code == 0 and re.search(r"example (1[2-9]|2[0-3])\b", text)
    for verb, what in (
        ("prepare", "leaves nothing stored"),
        ("score", "has no scores"),
        ("compare", "is not compared"),
    ):
        code, text = said(verb, "recipe.yaml")
        assert code == 2 and "data.streaming: " in text and what in text and "`data.streaming: false`" in text
    with pytest.raises(DataError, match="packtrain.PackedStream packs rows for a loop of your own"):
        load_examples(load_recipe("recipe.yaml"))
