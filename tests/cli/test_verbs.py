"""The command line: what it prints, how it fails, and what it does not load."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from packtrain.cli import fill_bare_resume, main
from packtrain.cli.batch_view import PADDING, PROMPT, SUPERVISED, documents_of, runs_of, text_of
from packtrain.cli.strategy_table import length_histogram
from packtrain.cli.train import next_commands
from packtrain.modeling.tokenizer import train_bpe
from packtrain.packing.collator import collate_flat, collate_padded
from tests.recipe.bad_recipes import BAD, GOOD, write

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
SMALL = ["data.num_rows=120", "data.eval_size=20", "examples_per_step=16"]


def run(*args: str) -> int:
    """The exit code of `packtrain ARGS`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return caught.value.code or 0


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def wide(monkeypatch):
    """Tables aren't squeezed."""
    monkeypatch.setenv("COLUMNS", "160")


# --------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["plan", "r.yaml", "--gpus", "0"], "--gpus: must be at least 1 (got 0)"),
        (["plan", "r.yaml", "--gpus", "two"], "--gpus: must be a whole number (got 'two')"),
        (["generate", "run", "--max-tokens", "0"], "--max-tokens: must be at least 1 (got 0)"),
        (["generate", "run", "--top-p", "2"], "--top-p: must be at most 1 (got 2)"),
        (["show", "r.yaml", "--step=-1"], "--step: must be at least 0 (got -1)"),
    ],
)
def test_a_bad_value_of_an_option_is_said_as_all_errors_are(words, what, capsys):
    assert run(*words) == 2
    assert capsys.readouterr().err == f"error: {what}\n    fix: `packtrain {words[0]} --help` says what it takes\n"


def test_a_missing_argument_keeps_its_usage(capsys):
    assert run("train") == 2
    assert "Missing argument 'RECIPE'" in capsys.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_exit_with_2_and_no_traceback(tmp_path, capsys, name):
    text, overrides, parts = BAD[name]
    # An override that starts with a dash must be glued to its option.
    code = run("plan", str(write(tmp_path, text)), *(f"--set={override}" for override in overrides))
    printed = capsys.readouterr()
    assert code == 2 and not printed.out
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    for part in parts:
        assert part in printed.err


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "plan", "show"])
def test_every_verb_fails_alike_in_a_process_of_its_own(tmp_path, verb):
    path = write(tmp_path, GOOD + "batching: {max_token: 1}\n")
    done = subprocess.run([sys.executable, "-m", "packtrain", verb, str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean `max_tokens`?" in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_unknown_strategies_are_found_before_any_data_is_read(tmp_path, capsys):
    assert run("train", str(write(tmp_path, GOOD)), "--set", "strategy=balancd") == 2
    printed = capsys.readouterr().err
    assert "batching.strategy: there is no such strategy (got 'balancd')" in printed
    assert "did you mean 'balanced'?" in printed and "packtrain.PackedStream" in printed


@pytest.mark.parametrize(
    "args", [["plan"], ["paln", "x.yaml"], ["plan", "x.yaml", "--gpus", "0"], ["show", "x", "--step", "a"]]
)
def test_wrong_usage_exits_with_2(capsys, args):
    assert run(*args) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_with_130(tmp_path):
    """The recipe is a pipe that nobody writes to, so the interrupt comes while it is read."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "packtrain", "plan", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    writer = os.open(pipe, os.O_WRONLY)  # returns once the other side reads
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130 and "Traceback" not in err


# ------------------------------------------------------------------------------------------------------ light


def test_version_and_help_load_nothing_heavy():
    program = (
        "import sys\n"
        "from packtrain.cli import main\n"
        "for args in (['--version'], ['--help'], ['train', '--help'], ['plan', '--help'], ['show', '--help']):\n"
        "    try: main(args)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("packtrain 0.") and done.stdout.endswith("[]\n")
    assert all(word in done.stdout for word in ("train", "plan", "show", "--set", "--resume", "--all", "--step"))


def test_plan_of_tokenised_rows_loads_neither_torch_nor_a_tokenizer(capsys, wide):
    """The first plan tokenises; every later one reads the lengths."""
    args = ["plan", str(QUICKSTART), "--all", *sets(SMALL)]
    assert run(*args) == 0
    first = capsys.readouterr().out
    program = (
        "import sys\n"
        "from packtrain.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'tokenizers', 'datasets') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokenising" not in done.stdout
    assert done.stdout.splitlines()[-20:] == first.splitlines()[-20:]


# ------------------------------------------------------------------------------------------------------- plan


def test_plan_prints_a_row_for_every_strategy(tmp_path, capsys, wide):
    """8 examples of 10 tokens, 4 per update, 20 tokens per micro-batch: all by hand."""
    np.save(tmp_path / "lengths.npy", np.full(8, 10, dtype=np.int32))
    recipe = write(tmp_path, GOOD.replace("{output_dir: results/run}", "{output_dir: x, num_train_epochs: 1}"))
    small = sets(["examples_per_step=4", "max_tokens=20", "max_length=10"])
    assert run("plan", str(recipe), "--all", "--lengths", str(tmp_path / "lengths.npy"), *small) == 0
    out = capsys.readouterr().out
    assert "8 examples, 80 tokens, mean 10.0" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line and line.split()[0].isidentifier()}
    everything = ["2", "4", "4", "4.0", "4", "0.0%", "20", "0"]
    for name in ("pad_max", "pad_longest", "group_by_length", "padding_free", "balanced"):
        assert rows[name] == everything
    for name in ("bfd", "ffd", "next_fit", "random", "wrapped"):
        assert rows[name] == ["*", *everything]
    assert "updates see other examples than with plain padding" in out


def test_plan_without_all_compares_with_plain_padding(tmp_path, capsys, wide):
    np.save(tmp_path / "lengths.npy", np.array([1, 9, 1, 9], dtype=np.int32))
    small = sets(["examples_per_step=4", "max_tokens=18", "max_length=9", "num_train_epochs=1"])
    assert run("plan", str(write(tmp_path, GOOD)), "--lengths", str(tmp_path / "lengths.npy"), *small) == 0
    out = capsys.readouterr().out
    assert "balanced" in out and "pad_longest" in out and "bfd" not in out
    assert "updates see other examples" not in out


def test_plan_prints_the_phases_of_a_schedule(tmp_path, capsys, wide):
    """12 tokens an update: of 2 tokens in 6 examples; then of 84 tokens in 22. Control: no phases without a schedule."""
    np.save(tmp_path / "lengths.npy", np.array([2] * 30 + [6] * 10, dtype=np.int32))
    small = sets(["examples_per_step=4", "max_tokens=24", "max_length=6", "num_train_epochs=2"])
    plan = ["plan", str(write(tmp_path, GOOD)), "--lengths", str(tmp_path / "lengths.npy"), *small]
    assert run(*plan, "--all", "--set", "batching.schedule=[{until: 0.3, max_length: 2}]") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.partition("Phases of the first epoch")[2].splitlines()]
    assert ["30.0%", "2", "18", "6", "12", "12", "12", "3"] in rows
    assert [row[:4] + row[-1:] for row in rows if row[:1] == ["100.0%"]] == [["100.0%", "6", "22", "3", "8"]]
    updates = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith(("balanced ", "bfd "))}
    assert updates == {"balanced": "21", "bfd": "*"}  # 3 + 8 of the first epoch and 10 of the second
    assert "seen once and whole" in out
    assert run(*plan) == 0
    assert "Phases" not in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--strategy", "balanced"], ["--max-tokens", "16384"], ["--strategy", "bfd"]])
def test_plan_of_a_recipe_takes_its_strategy_from_it(tmp_path, capsys, option):
    """Also where the option says what it would be without a recipe."""
    np.save(tmp_path / "lengths.npy", np.array([1, 9, 1, 9], dtype=np.int32))
    recipe = str(write(tmp_path, GOOD))
    assert run("plan", recipe, "--lengths", str(tmp_path / "lengths.npy"), *option) == 2
    assert "work only without a recipe" in capsys.readouterr().err
    assert run("plan", "--lengths", str(tmp_path / "lengths.npy"), *option) == 0


def test_plan_says_what_a_strategy_cannot_do(tmp_path, capsys, wide):
    """`wrapped` may cut what doesn't fit; with --all the others say that they can't."""
    np.save(tmp_path / "lengths.npy", np.array([30, 5, 5], dtype=np.int32))
    args = [
        "plan",
        str(write(tmp_path, GOOD)),
        "--all",
        "--lengths",
        str(tmp_path / "lengths.npy"),
        "--set",
        "max_tokens=20",
    ]
    assert run(*args, "--set", "strategy=wrapped") == 0
    assert "balanced cannot be used: " in capsys.readouterr().out
    assert run(*args, "--set", "max_length=20") == 2
    assert "30" in capsys.readouterr().err


def test_plan_rejects_tokens_per_step_where_steps_are_examples(tmp_path, capsys):
    np.save(tmp_path / "lengths.npy", np.full(8, 10, dtype=np.int32))
    args = [
        "plan",
        str(write(tmp_path, GOOD)),
        "--lengths",
        str(tmp_path / "lengths.npy"),
        "--set",
        "tokens_per_step=64",
    ]
    assert run(*args) == 2
    assert "batching.tokens_per_step" in capsys.readouterr().err
    assert run(*args, "--set", "strategy=bfd", "--all") == 0  # and the comparison leaves it out where it can't be


def lines_of(renderable) -> list[str]:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_histogram_of_a_long_tail():
    lengths = np.array([1] * 2 + [3] * 4 + [40] * 8 + [1000] * 2)
    assert lines_of(length_histogram(lengths, unicode=False)) == [
        "",
        "16 examples, 2,334 tokens, mean 145.9",
        "        1 ##########                               2 12.5%",
        "      2-3 ####################                     4 25.0%",
        "      4-7                                          0  0.0%",
        "     8-15                                          0  0.0%",
        "    16-31                                          0  0.0%",
        "    32-63 ######################################## 8 50.0%",
        "   64-127                                          0  0.0%",
        "  128-255                                          0  0.0%",
        "  256-511                                          0  0.0%",
        "512-1,000 ##########                               2 12.5%",
        "shortest 1   10% 1   median 40   90% 1,000   99% 1,000   longest 1,000",
        "",
    ]


@pytest.mark.parametrize("lengths", [[], [7], [5, 5, 5], [0, 1], [1, 2**20]])
def test_histogram_of_anything(lengths):
    text = "\n".join(lines_of(length_histogram(np.array(lengths, dtype=np.int64))))
    assert ("no examples" in text) == (not lengths)
    assert sum(int(line.split()[-2]) for line in text.splitlines() if line.endswith("%")) == len(lengths)


# ------------------------------------------------------------------------------------------------------- show


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([], vocab_size=262)  # one token per byte


@pytest.fixture
def batches(tokenizer):
    """Two documents, `ask?yes` and `no`, the answers supervised, in both layouts."""
    ids = np.array(tokenizer("ask?yes")["input_ids"] + tokenizer("no")["input_ids"])
    labels = ids.copy()
    labels[:4] = -100
    parts = (ids, labels, np.array([7, 2]), np.array([5, 3]))
    return collate_flat(*parts), collate_padded(*parts, pad_token_id=tokenizer.pad_token_id)


def test_documents_of_both_layouts_are_the_same(batches):
    flat, padded = (documents_of(batch) for batch in batches)
    assert [document.example_id for document in flat] == [5, 3]
    assert [document.positions for document in flat] == [[0, 1, 2, 3, 4, 5, 6], [0, 1]]
    assert [document.supervised for document in flat] == [3, 1]
    assert [document.padding for document in flat] == [0, 0]
    assert [document.padding for document in padded] == [0, 5]
    for one, other in zip(flat, padded, strict=True):
        assert (one.input_ids, one.labels, one.weights) == (other.input_ids, other.labels, other.weights)


def test_text_is_coloured_by_what_is_learnt(batches, tokenizer):
    def runs(document):
        text = text_of(runs_of(document, tokenizer), ("[[", "]]"))
        return [(text.plain[span.start : span.end], span.style) for span in text.spans]

    first, second = documents_of(batches[1])
    assert runs(first) == [("ask?", PROMPT), ("[[yes]]", SUPERVISED)]
    # The first token of a document is never learnt: nothing stands before it.
    assert runs(second) == [("n", PROMPT), ("[[o]]", SUPERVISED)]


def test_control_characters_in_data_do_not_reach_the_terminal(tokenizer):
    ids = np.array(tokenizer("a\x1b[2Jb\tc\n")["input_ids"])
    (document,) = documents_of(collate_flat(ids, ids, np.array([len(ids)]), np.array([0])))
    assert "".join(run.text for run in runs_of(document, tokenizer)) == "a\\x1b[2Jb\tc\n"


def test_filler_micro_batches_are_shown_as_such(tokenizer):
    ids, labels = np.zeros(2, dtype=np.int64), np.full(2, -100)
    (document,) = documents_of(collate_flat(ids, labels, np.array([2]), np.array([-1])))
    text = text_of(runs_of(document, tokenizer), ("[[", "]]"), padding=True)
    assert document.supervised == 0 and {span.style for span in text.spans} == {PADDING}


@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
def test_show_prints_the_batch_that_training_would_see(capsys, wide, strategy):
    from packtrain.objectives.task import load_task
    from packtrain.recipe.reader import load_recipe

    overrides = [*SMALL, f"strategy={strategy}"]
    assert run("show", str(QUICKSTART), "--step", "2", "--documents", "16", *sets(overrides)) == 0
    out = capsys.readouterr().out
    assert "step 2 of 7 (epoch 0), rank 0 of 1, micro-batch 0 of" in out
    task = load_task(load_recipe(QUICKSTART, overrides))
    shown = [
        int(line.split("example ")[1].split()[0])
        for line in out.splitlines()
        if line.startswith("document ") and "· example" in line
    ]
    assert shown
    for example_id in shown:
        text = task.tokenizer.decode(task.train[example_id]["input_ids"])
        assert text.strip() in out.replace("[[", "").replace("]]", "")


def test_show_of_given_examples_and_of_what_is_not_there(capsys, wide):
    assert run("show", str(QUICKSTART), "--examples", "3, 17", *sets(SMALL)) == 0
    out = capsys.readouterr().out
    assert "\n2 examples: flat [1, " in out and "example 3 " in out and "example 17 " in out
    for args, part in (
        (["--step", "7"], "choose one from 0 to 6"),
        (["--rank", "1"], "--gpus sets their number"),
        (["--micro-batch", "99"], "there is no such micro-batch"),
        (["--examples", "3,100"], "there is no example 100, only 100 of them"),
        (["--examples", "3,100"], "give numbers from 0 to 99"),
        (["--examples", "three"], "is not a list of examples"),
    ):
        assert run("show", str(QUICKSTART), *args, *sets(SMALL)) == 2
        assert part in capsys.readouterr().err


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> str:
    """A recipe over two sources, with a file that is not read next to one of them."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(f"{name}/rows.jsonl").write_text(f'{{"text": "{name} one two three"}}\n' * 4)
    Path("b/notes.txt").write_text("")
    text = QUICKSTART.read_text()
    Path("mixed.yaml").write_text(
        text.replace("path: packtrain:arithmetic", "mixture: [{path: a, weight: 3}, {path: b, weight: 1}]")
        .replace("num_rows: ", "# num_rows: ")
        .replace("eval_size: ", "# eval_size: ")
    )
    return "mixed.yaml"


def test_plan_says_which_files_were_read_before_and_after_they_are_tokenised(capsys, wide, mixed):
    for tokenised in (False, True):
        assert run("plan", mixed) == 0
        out = capsys.readouterr().out
        assert ("tokenising:" in out) != tokenised
        assert "read: a/rows.jsonl (4 rows), b/rows.jsonl (4 rows)" in out
        assert "not read (not a supported kind of file): b/notes.txt" in out
        assert "75.0% a (4 rows): 6 examples, each of its 4 is read 1 or 2 times" in out
        assert "25.0% b (4 rows): 2 examples, chosen from 4, the same in every epoch" in out


def test_show_names_the_row_of_its_source(capsys, wide, mixed):
    assert run("show", mixed, "--examples", "0,7") == 0
    out = capsys.readouterr().out
    assert "a/rows.jsonl, line 1" in out and "b/rows.jsonl, line " in out


def what_show_prints(monkeypatch, recipe: Path, *args: str) -> dict:
    """The batch that `show` makes visible."""
    printed = []
    monkeypatch.setattr("packtrain.cli.batch_view.print_batch", lambda batch, *_, **__: printed.append(batch))
    assert run("show", str(recipe), *args) == 0
    return printed[0]


def what_training_sees(recipe: Path, overrides: list[str], step: int) -> dict:
    """The first micro-batch of an update, from the trainer's own loader."""
    from packtrain.recipe.reader import load_recipe
    from packtrain.training.run import build

    trainer = build(load_recipe(recipe, overrides), console=Console(quiet=True))
    trainer.state.global_step = step
    return next(iter(trainer.get_train_dataloader()))


ROBERTA = (
    "config={model_type: roberta, is_decoder: true, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 2050}"
)


@pytest.mark.parametrize(
    ("name", "step", "overrides"),
    [
        ("quickstart", 9, []),
        ("quickstart", 0, [ROBERTA]),
        ("quickstart", 0, [ROBERTA, "strategy=pad_longest"]),
        ("rainbow_cpu", 1, []),
        ("rainbow_cpu", 9, []),
    ],
)
def test_show_prints_the_very_batch(tmp_path, monkeypatch, name, step, overrides):
    """Masks are those of the update's epoch, positions begin where the model's do."""
    recipe = QUICKSTART.parent / f"{name}.yaml"
    small = [*SMALL, "num_train_epochs=3", "use_cpu=true", f"training.output_dir={tmp_path}", *overrides]
    shown = what_show_prints(monkeypatch, recipe, "--step", str(step), *sets(small))
    seen = what_training_sees(recipe, small, step)
    assert shown.keys() == seen.keys()
    for key, value in seen.items():
        assert torch.equal(shown[key], value) if isinstance(value, torch.Tensor) else shown[key] == value, key
    assert (shown["position_ids"].min() > 0) == (ROBERTA in overrides)


# ------------------------------------------------------------------------------------------------------ train


@pytest.mark.parametrize(
    ("args", "filled"),
    [
        (["train", "r.yaml"], ["train", "r.yaml"]),
        (["train", "r.yaml", "--resume"], ["train", "r.yaml", "--resume", "last"]),
        (["train", "r.yaml", "--resume", "--set", "a=1"], ["train", "r.yaml", "--resume", "last", "--set", "a=1"]),
        (["train", "r.yaml", "--resume", "run/checkpoint-5"], ["train", "r.yaml", "--resume", "run/checkpoint-5"]),
        (["train", "--resume", "r.yaml"], ["train", "--resume", "last", "r.yaml"]),
        (["train", "--resume", str(QUICKSTART)], ["train", "--resume", "last", str(QUICKSTART)]),
        (["train", "--resume", __file__], ["train", "--resume", "last", __file__]),  # whatever the recipe's name
        (["train", "--resume", "run/checkpoint-5", "r.yaml"], ["train", "--resume", "run/checkpoint-5", "r.yaml"]),
        ([], []),
    ],
)
def test_resume_may_stand_alone(args, filled):
    assert fill_bare_resume(args) == filled


def test_the_next_commands_can_be_pasted():
    overrides = ["lora.target_modules=[q, v]", "output_dir=here"]
    found = [shlex.split(command) for _, command in next_commands(Path("my recipes/a.yaml"), overrides, "there")]
    start = ["my recipes/a.yaml", "--set", "lora.target_modules=[q, v]", "--set"]
    assert found == [
        ["packtrain", "show", *start, "output_dir=here", "--step", "0"],
        ["packtrain", "plan", *start, "output_dir=here", "--all"],
        ["packtrain", "train", *start, "batching.strategy=pad_longest", "--set", "training.output_dir=there"],
    ]
    _, first = next_commands(Path("a.yaml"), [], "there", sampled=True)[0]
    assert first == "packtrain evaluate a.yaml", "of a model that can be sampled"
    _, first = next_commands(Path("a.yaml"), [], "there", run="my runs/one")[0]
    assert first == "packtrain generate 'my runs/one'"
    *_, (_, last) = next_commands(Path("a.yaml"), [], "there", shapes=True)
    assert "--set batching.shapes=null --set batching.strategy=pad_longest" in last  # padded layouts have no shapes
    *others, (_, last) = next_commands(Path("a.yaml"), [], "there", launch="cpu")
    assert last.endswith(" --launch cpu"), "speeds are compared on as many processes"
    assert not any("--launch" in command for _, command in others)


def test_nothing_asked_is_answered_with_help(capsys):
    assert run() == 0
    assert "--version" in capsys.readouterr().out


def test_train_trains_and_says_what_came_of_it(tmp_path, capsys, wide):
    torch.manual_seed(0)
    tiny = [*SMALL, "config.hidden_size=32", "config.intermediate_size=64", "config.num_hidden_layers=1"]
    output = [f"training.output_dir={tmp_path / 'run'}", "max_steps=4", "save_strategy=no", "use_cpu=true"]
    assert run("train", str(QUICKSTART), *sets(tiny + output)) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out and "real tokens/s" in out and str(tmp_path / "run") in out
    assert all(out.count(f"packtrain {verb}") == 1 for verb in ("generate", "show", "plan", "train"))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.ci
@pytest.mark.slow
def test_audit_exits_with_one_where_the_recipes_own_combination_leaks(tmp_path, capsys):
    recipe = tmp_path / "opt.yaml"
    recipe.write_text(
        "model: {config: {model_type: opt, hidden_size: 32, ffn_dim: 64, num_hidden_layers: 2,\n"
        "  num_attention_heads: 4, word_embed_proj_dim: 32}, tokenizer_vocab_size: 300, attn_implementation: sdpa}\n"
        "data: {path: 'packtrain:arithmetic'}\n"
        "training: {output_dir: out}\n"
    )
    quick = ["--attn-implementation", "sdpa", "--layout", "flat", "--device", "cpu"]
    assert run("audit", str(recipe), *quick) == 1
    assert "leaks" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace("attn_implementation: sdpa", "attn_implementation: auto"))
    assert run("audit", str(recipe), *quick) == 0  # control: packtrain_varlen repairs it


def test_plan_recommends_a_strategy_with_reasons(capsys):
    assert run("plan", str(QUICKSTART), *sets(SMALL), "--recommend") == 0
    told = capsys.readouterr().out
    assert "recommended: balanced" in told and "every update sees the same examples as with plain padding" in told


def test_launch_names_a_file(capsys):
    assert run("train", str(QUICKSTART), "--launch", "zero9") == 2
    assert "did you mean zero" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan", "a" * 5000], ["plan", "quickstart", "--set", f"data.path={'a' * 5000}"]])
def test_a_path_that_is_too_long_is_named(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "a path is too long: 'aaa" in capsys.readouterr().err


@pytest.mark.parametrize("level, code", [("2", 2), ("1", 0)])
def test_python_without_docstrings_is_refused(level, code):
    environment = os.environ | {"PYTHONOPTIMIZE": level}
    command = [sys.executable, "-m", "packtrain", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code and ("PYTHONOPTIMIZE" in done.stdout) == (code == 2)


def test_a_dtype_that_is_none_is_refused(capsys):
    for words in (["generate", "somewhere"], ["merge", "somewhere", "--out", "elsewhere"]):
        assert run(*words, "--dtype", "half") == 2
        assert "choose from auto, float32, bfloat16, float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "option", "kind"),
    [("quickstart", ["--temperature", "0.5"], "causal"), ("rainbow_cpu", ["--base"], "masked-diffusion")],
)
def test_an_option_of_the_other_kind_of_model_is_refused(recipe, option, kind, capsys):
    assert run("evaluate", recipe, *option) == 2
    assert f"{option[0]}: has no effect on a {kind} model" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["keys", "--schema"], ["generate", "nowhere", "--prompt", "hi", "--out"]])
@pytest.mark.parametrize("place", ["missing/file", "."])
def test_a_file_that_can_not_be_written_is_said_before_any_work(verb, place, tmp_path, capsys):
    assert run(*verb, str(tmp_path / place)) == 2
    assert f"{verb[-1]}: can't be written" in capsys.readouterr().err
