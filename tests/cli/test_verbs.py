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
from packtrain.cli.strategy_table import length_histogram
from packtrain.cli.train import next_commands
from tests.cli.helpers import QUICKSTART, SMALL, run, sets
from tests.recipe.bad_recipes import BAD, GOOD, write

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_a_model_that_can_not_be_sampled_is_said_before_a_prompt_is_asked_for(capsys):
    assert run("sample", "quickstart") == 2
    said = capsys.readouterr()
    assert "objective.name: cannot be sampled by diffusion" in said.err and "prompt" not in said.out


@pytest.mark.parametrize("verb", [["keys", "--schema"], ["generate", "nowhere", "--prompt", "hi", "--out"]])
@pytest.mark.parametrize("place", ["missing/file", "."])
def test_a_file_that_can_not_be_written_is_said_before_any_work(verb, place, tmp_path, capsys):
    assert run(*verb, str(tmp_path / place)) == 2
    assert f"{verb[-1]}: can't be written" in capsys.readouterr().err
