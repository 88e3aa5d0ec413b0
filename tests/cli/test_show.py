"""What `packtrain show` marks as supervised, with and without colours, and what it says of the data."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.cli import main
from packtrain.cli.batch_view import Run, choose_marks, text_of
from packtrain.data.report import ALL_TURNS
from packtrain.objectives.task import load_task
from packtrain.recipe.reader import load_recipe

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one or two?"},
    {"role": "assistant", "content": "two"},
]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def recipe_of(tmp_path, rows: list[dict]) -> str:
    """A recipe over these rows, with a model of a few weights and a tokenizer that has one token per byte."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,\n"
        "  num_attention_heads: 1, max_position_embeddings: 512}, tokenizer_vocab_size: 264}\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}, max_length: 512}}\n"
        "batching: {examples_per_step: 2, max_tokens: 512}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, max_steps: 1, save_strategy: 'no', use_cpu: true}}\n"
    )
    return str(recipe)


def printed(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert not ended.value.code
    return capsys.readouterr().out


def supervised_in(out: str) -> list[list[str]]:
    """What stands between the marks that the legend names, for each document that was printed."""
    begin, end = re.search(r"tokens stand between (\S+) and (\S+); all else is read", out).groups()
    texts = re.split(r"^document .*─\n", out.split("is read, not learnt\n")[1], flags=re.MULTILINE)[1:]
    return [re.findall(f"{re.escape(begin)}(.*?){re.escape(end)}", text, flags=re.DOTALL) for text in texts]


def supervised_of(recipe: str, *overrides: str) -> list[list[str]]:
    """The same, from the examples themselves."""
    task = load_task(load_recipe(recipe, list(overrides)))
    found = []
    for example in task.train:
        ids, learnt = example["input_ids"], example["labels"] != -100
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learnt)) + 1)
        found.append([task.tokenizer.decode(ids[run]) for run in runs if learnt[run[0]]])
    return found


TEXTS = {
    "plain": [{"prompt": "ask?", "completion": "yes\n\nno"}, {"prompt": "and", "completion": "so on"}],
    "with our own marks": [{"prompt": "a[[0]]", "completion": "[[b]] <<"}, {"prompt": "and", "completion": "}}, {{"}],
    "at the ends": [{"prompt": "a[", "completion": "[b]"}, {"prompt": "a<", "completion": "}"}],
    "conversation": [{"messages": [*CHAT, *CHAT[1:]]}, {"messages": CHAT}],
}


@pytest.mark.parametrize("surrounding", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1"}], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_supervised_is_seen_without_colours(tmp_path, capsys, monkeypatch, name, surrounding):
    for key, value in surrounding.items():
        monkeypatch.setenv(key, value)
    recipe = recipe_of(tmp_path, TEXTS[name])
    more = ["data.completion_only_loss=true"]
    out = printed(capsys, "show", recipe, "--examples", "0,1", "--set", *more)
    assert bool(ANSI.search(out)) == ("FORCE_COLOR" in surrounding)
    assert supervised_in(ANSI.sub("", out)) == supervised_of(recipe, *more)


@pytest.mark.parametrize("columns", [80, 120])
def test_headers_and_numbers_are_whole_in_a_narrow_terminal(tmp_path, capsys, monkeypatch, columns):
    """`positio…` and `superv…` at 80 columns; a long name of a file wraps instead. A pipe's lines are not broken."""
    recipe = recipe_of(tmp_path, TEXTS["plain"])
    for name in ("a_file_with_a_rather_long_name", "b"):
        (tmp_path / f"{name}.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed(capsys, "show", recipe, "--documents", "1", "--set", f"data.path={tmp_path}/*.jsonl")
    assert "…" not in out and max(map(len, out.splitlines()[-8:-3])) <= columns
    assert [*re.search("^document +example.*", out, flags=re.MULTILINE)[0].split()][-3:] == [
        "supervised",
        "weight",
        "padding",
    ]
    assert re.search(r"^step 0 of 1 .*: flat \[.*, 2 documents, .* supervised\), 0 padding$", out, flags=re.MULTILINE)
    out = printed(capsys, "show", recipe, "--examples", "0", "--set", f"data.path={tmp_path}/*.jsonl")
    assert ", 1 document, " in out


def test_of_masked_answers_the_masked_tokens_are_supervised(tmp_path, capsys):
    """The legend says that all else is not learnt: what a mask has left visible is read only."""
    recipe = recipe_of(tmp_path, [{"prompt": "ask", "completion": "an answer of some length"}] * 2)
    more = ["objective={name: masked_diffusion, tail: eos, canvas: fixed, canvas_size: 64}"]
    for objective in (more, ["objective={name: block_diffusion, block_size: 8}"]):
        out = printed(capsys, "show", recipe, "--set", *objective)
        found = supervised_in(out)
        assert all(found) and {text.replace("<|mask|>", "") for runs in found for text in runs} == {""}
        count = int(re.search(r"\((\d+) supervised\)", out)[1])
        assert count == sum(text.count("<|mask|>") for runs in found for text in runs) > 0


def test_padding_is_named_where_no_text_is(tmp_path, capsys):
    out = printed(capsys, "show", recipe_of(tmp_path, TEXTS["plain"]), "--set", "strategy=pad_longest")
    assert re.search(r"^document \d · example 1 · \d padding ─", out, flags=re.MULTILINE)
    assert re.search(r"^document \d · example 0 ─", out, flags=re.MULTILINE)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.text("[]<>{}1a", max_size=6), min_size=1, max_size=5), min_size=1, max_size=3), st.booleans()
)
def test_marks_are_found_nowhere_else(texts, first):
    documents = [[Run(text, bool(place % 2) is first) for place, text in enumerate(runs)] for runs in texts]
    begin, end = marks = choose_marks(documents)
    for runs in documents:
        shown = text_of(runs, marks).plain
        read, supervised = [], False
        while shown:
            before, mark, shown = shown.partition(end if supervised else begin)
            read.append(Run(before, supervised))
            supervised = supervised is not bool(mark)
        assert [run for run in read if run.text] == [run for run in runs if run.text]


WHOLE = "system and user turns are supervised, too"


@pytest.mark.parametrize("verb", ["plan", "show", "train"])
def test_every_verb_says_what_became_of_the_rows(tmp_path, capsys, verb):
    rows = [{"messages": CHAT, "source": "web"}, {"messages": [*CHAT, *CHAT[1:]], "source": "book"}]
    recipe = recipe_of(tmp_path, rows)
    report = load_task(load_recipe(recipe)).train.report
    assert report.notes == ("columns not used: source", ALL_TURNS)
    out = printed(capsys, verb, recipe)
    lines = [line.strip() for line in out.splitlines()]
    assert all(any(line.endswith(said) for line in lines) for said in report.lines())
    assert f"{ALL_TURNS}: {report.supervised_tokens / report.tokens:.1%} of all tokens" in out


@pytest.mark.parametrize(
    ("rows", "override"),
    [
        ([{"messages": CHAT}, {"messages": CHAT}], "data.completion_only_loss=true"),
        (TEXTS["plain"], "data.completion_only_loss=false"),
        (TEXTS["plain"], "data.format=auto"),
    ],
)
def test_the_turns_of_users_are_mentioned_where_they_are_learnt_only(tmp_path, capsys, rows, override):
    out = printed(capsys, "show", recipe_of(tmp_path, rows), "--set", override)
    assert "2 rows" in out and WHOLE not in out


def test_rows_with_brackets_in_their_names_are_printed_as_they_are(tmp_path, capsys):
    rows = [row | {"[bold]odd": 1} for row in TEXTS["plain"]]
    recipe = recipe_of(tmp_path, rows)
    assert all("columns not used: [bold]odd" in printed(capsys, verb, recipe) for verb in ("plan", "show", "train"))


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_rows_are_shown_by_their_lines_as_errors_name_them(tmp_path, capsys):
    recipe = recipe_of(tmp_path, [{"text": f"words {n}"} for n in range(1, 10)])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n" + rows.read_text() + '{"text": 1}\n')  # the first line is blank, and row 0 is on line 2
    some = ["--set", "data.on_bad_row=skip", "--set", "data.eval_size=3"]
    task = load_task(load_recipe(recipe, ["data.on_bad_row=skip", "data.eval_size=3"]))
    trained, kept = ([int(row) + 2 for row in part.rows] for part in (task.train, task.held_out))

    out = printed(capsys, "show", recipe, "--lines", f"{trained[4]},{trained[1]}", *some)
    assert re.findall(r"ords (\d)<", out) == [str(trained[4] - 1), str(trained[1] - 1)]  # "w" is read, not learnt
    assert f"line {trained[4]} " in out and "2 examples: flat" in out
    out = printed(capsys, "show", recipe, "--lines", f"rows.jsonl:{trained[4]}", *some)
    assert f"ords {trained[4] - 1}<" in out

    out = printed(capsys, "show", recipe, "--held-out", "--lines", str(kept[1]), *some)
    assert f"ords {kept[1] - 1}<" in out and "1 held-out example: flat" in out
    out = printed(capsys, "show", recipe, "--held-out", "--documents", "2", *some)
    assert "2 held-out examples" in out and all(f"line {line} " in out for line in kept[:2])

    assert "is held out" in refused(capsys, "show", recipe, "--lines", str(kept[0]), *some)
    assert "is trained on" in refused(capsys, "show", recipe, "--held-out", "--lines", str(trained[0]), *some)
    assert "line 11 is a bad row: 'text' is a number" in refused(capsys, "show", recipe, "--lines", "11", *some)
    assert "there is no such row" in refused(capsys, "show", recipe, "--lines", "1", *some)
    assert "there is no such row" in refused(capsys, "show", recipe, "--lines", "other.jsonl:3", *some)
    assert "is not a list of lines" in refused(capsys, "show", recipe, "--lines", "three", *some)
    assert "holds no rows out" in refused(capsys, "show", recipe, "--held-out", *some[:2])
    assert "next to --examples" in refused(capsys, "show", recipe, "--lines", "3", "--examples", "1", *some)
