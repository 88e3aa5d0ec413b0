"""What the documentation says is there: commands, options, keys, recipes, rows, links; and what it shows is printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from packtrain.cli import app, fill_bare_resume, main
from packtrain.compare.experiment import load_experiment
from packtrain.data.examples import build_examples
from packtrain.data.formats import FORMATS
from packtrain.data.sources import open_rows
from packtrain.errors import PacktrainError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives import TokenClassification
from packtrain.recipe.reader import fields_of, load_recipe
from packtrain.recipe.recipe import SECTIONS
from packtrain.recipe.shipped import find_recipe, find_shipped
from packtrain.training.launch import find_launch_file
from tests.data.helpers import shown
from tests.docs.markdown import ROOT, Block, blocks, broken_links, commands, spans

PAGES = [
    "README.md", "recipes/README.md", "launch/README.md", "results/README.md", "tests/README.md", ".github/CONTRIBUTING.md",
]  # fmt: skip
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
IGNORED = {".git", ".venv", ".pytest_cache", "build", "out", "node_modules"}
EVERY_PAGE = sorted(page for page in ROOT.rglob("*.md") if not IGNORED & set(page.relative_to(ROOT).parts))
BLOCKS = [(page, block) for page, text in TEXTS.items() for block in blocks(text)]
VERBS = typer.main.get_command(app)
PLACEHOLDERS = {"RECIPE", "MODEL", "NAME", "MODEL_OR_RECIPE"}


def of(*languages: str) -> list:
    """The blocks in one of these languages, as parameters of a test; those of the walk are run by a test of their own."""
    found = [(page, block) for page, block in BLOCKS if block.language in languages]
    return [
        pytest.param(block, id=f"{page}:{block.line}") for page, block in found if not block.mark.startswith("walk")
    ]


# Commands


def check_command(words: list[str], *, made: frozenset[str] = frozenset()) -> None:
    """Raises an error for a command that could not be started: an unknown verb, option, recipe, key or file.

    Args:
        made: recipes that `packtrain init` has made in the same page.
    """
    program, *rest = words
    if program in ("torchrun", "accelerate"):
        check_launcher(program, rest)
        at = rest.index("-m")
        program, *rest = rest[at + 1 :]
    if program == "packtrain":
        check_packtrain(rest, made)
    elif program in ("python", "python3") and rest[0] != "-m":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "pytest":
        paths = [word for word in rest if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), paths
    elif program == "pip":
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
        for named in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert all(re.search(rf"^{extra} =", extras, re.MULTILINE) for extra in named.split(",")), named


def check_packtrain(words: list[str], made: frozenset[str]) -> None:
    if words in (["--help"], ["--version"]):
        return
    verb, *rest = fill_bare_resume(words)
    command = VERBS.commands.get(verb)
    assert command is not None, f"packtrain has no verb {verb}"
    if rest == ["--help"]:
        return
    given = command.make_context(verb, rest).params
    if given.get("launch"):
        find_launch_file(given["launch"])
    recipe = str(given.get("recipe") or "")
    if not recipe or recipe in PLACEHOLDERS or recipe.removesuffix(".yaml") in made:
        recipe = "start"
    below = "compare" if verb == "compare" else ""
    file = ROOT / recipe if (ROOT / recipe).is_file() else find_recipe(recipe, below=below)
    if below:
        load_experiment(file, ["data.path=rows.jsonl", *(given["overrides"] or [])])
    else:
        load_recipe(file, ["data.path=rows.jsonl", *(given.get("overrides") or [])])


def check_launcher(program: str, words: list[str]) -> None:
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words)
        return
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    given = launch_command_parser().parse_args(words[1:])
    assert (ROOT / given.config_file).is_file(), given.config_file


def made_in(text: str) -> frozenset[str]:
    """The recipes that a page makes by `packtrain init` or writes in its walk, and the default name."""
    return frozenset({"recipe", *re.findall(r"(?:packtrain init |<!-- walk: )(\w+)", text)})


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(p, b, id=f"{p}:{b.line}")
        for p, b in BLOCKS
        if b.language in ("bash", "sh", "") and not b.mark.startswith("walk")  # which is walked
    ],
)
def test_commands_can_be_started(page, block):
    for words in commands(block.code):
        check_command(words, made=made_in(TEXTS[page]))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_can_be_started(page):
    for code in spans(TEXTS[page]):
        if re.match(r"(packtrain [a-z]|torchrun |accelerate launch )", code) and "..." not in code:
            (words,) = commands(code)
            if len(words) > 2 or words[0] != "packtrain":  # `packtrain plan` alone names the verb
                check_command(words, made=made_in(TEXTS[page]))
            else:
                assert words[1] in VERBS.commands, code


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipes_say_how_they_are_started(recipe):
    comments = re.findall(r"^# +(packtrain .*(?:\n# {4,}[^p].*)*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert comments
    for comment in comments:
        (words,) = commands(" ".join(re.split(r"\n# +", comment)).replace("{file}", "recipe.yaml"))
        check_command(words, made=frozenset({"recipe"}))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("packtrain plan quickstart --al", "No such option: --al"),
        ("packtrain plam quickstart", "no verb plam"),
        ("packtrain plan quikstart", "did you mean quickstart"),
        ("packtrain train quickstart --set batching.max_token=8", "did you mean `max_tokens`"),
        ("packtrain train quickstart --launch zero4", "did you mean zero"),
        ("torchrun --nproc_per_node 8 -m packtrain trian quickstart", "no verb trian"),
        ("accelerate launch --config_file launch/zero4.yaml -m packtrain train quickstart", "zero4.yaml"),
        ("pytest tests/pakcing", "tests/pakcing"),
        ("python results/atach/run.py", "results/atach/run.py"),
        ("pip install -e '.[tests]'", "tests"),
    ],
)
def test_a_command_that_could_not_be_started_is_found(command, message):
    (words,) = commands(command)
    with pytest.raises(Exception, match=message):
        check_command(words)


# Recipes, keys and rows


def check_yaml(code: str, tmp_path: Path) -> None:
    """Raises an error for YAML that is no recipe, or sections that don't go with the quickstart."""
    tree = yaml.safe_load(code)
    if {"model", "data", "training"} <= set(tree):
        path = tmp_path / "recipe.yaml"
        path.write_text(code, encoding="utf-8")
        load_recipe(path)
        return
    assert set(tree) <= set(SECTIONS), set(tree) - set(SECTIONS)
    keys = [f"{section}.{key}={yaml.safe_dump(value)}" for section, body in tree.items() for key, value in body.items()]
    if "mixture" in tree.get("data", ()):
        keys += ["data.path=null", "data.num_rows=null"]
    load_recipe(find_shipped("quickstart", "recipes", kind="recipe"), keys)


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_blocks_are_recipes(block, tmp_path):
    if block.mark == "example: going on":
        pytest.skip("needs an adapter: it is trained in test_examples.py")
    if block.mark != "experiment":
        check_yaml(block.code, tmp_path)
        return
    (tmp_path / "compare").mkdir()
    (tmp_path / "quickstart.yaml").write_text((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    (tmp_path / "compare/mine.yaml").write_text(block.code, encoding="utf-8")
    load_experiment(tmp_path / "compare/mine.yaml")


@pytest.mark.parametrize("code", ["objective: {name: causal}", "batchin: {strategy: bfd}", "data: {max_lenght: 3}"])
def test_yaml_that_is_no_recipe_is_found(code, tmp_path):
    with pytest.raises((AssertionError, PacktrainError)):
        check_yaml(code, tmp_path)


def unknown_keys(text: str) -> list[str]:
    """The `section.key`s in code of a page that no recipe has."""
    named = [key for code in spans(text) for key in re.findall(r"(?<![\w./-])([a-z]+\.\w+)(?![\w./(])", code)]
    return [
        key for key in named if key.split(".")[0] in SECTIONS and key.split(".")[1] not in fields_of(key.split(".")[0])
    ]


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_running_text_are_keys(page):
    assert unknown_keys(TEXTS[page]) == []


def test_a_key_that_is_none_is_found():
    assert unknown_keys("set `data.max_lenght` and `batching.max_tokens: 8`") == ["data.max_lenght"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["What is 2+2? It is 4."] * 20, vocab_size=300)


def example_of(line: str, name: str, tokenizer, tmp_path: Path) -> str:
    """The text (or ids) of a row's example, with what is supervised in brackets; checks that the row is of that format."""
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    kind = FORMATS[name].kinds[0]
    examples = build_examples(open_rows(tmp_path / "rows.jsonl"), tokenizer, kind=kind, cache_dir=tmp_path)
    assert examples.report.format == name
    if kind == "words":  # of which the first of a row has a class, too
        task = TokenClassification().task(tokenizer, examples, None, seed=0)
        ids, labels = task.train[0]["input_ids"], task.train[0]["labels"]
        examples = [{"input_ids": ids, "labels": np.where(labels == -100, labels, ids)}]
    (text,) = shown(tokenizer, examples)
    if name == "input_ids":
        ids, labels = examples[0]["input_ids"].tolist(), examples[0]["labels"].tolist()
        text = " ".join(
            f"[{token}]" if token == label else str(token) for token, label in zip(ids, labels, strict=True)
        )
        text = text.replace("] [", " ")
    return text


@pytest.mark.parametrize("block", of("json"))
def test_rows_have_the_format_that_is_said(block, tokenizer, tmp_path):
    kind, _, names = block.mark.partition(": ")
    assert kind in ("row", "rows"), f"line {block.line}: a block of rows says their format in the line above it"
    for line, name in zip(block.code.splitlines(), names.split(", "), strict=True):
        example_of(line, name, tokenizer, tmp_path)


def test_a_row_of_another_format_is_found(tokenizer, tmp_path):
    with pytest.raises(AssertionError):
        example_of('{"text": "a b c"}', "messages", tokenizer, tmp_path)


def test_every_format_is_shown_with_what_is_supervised(tokenizer, tmp_path):
    page = blocks(TEXTS["recipes/README.md"])
    seen = set()
    for row, text in zip(page, page[1:], strict=False):
        if row.mark.startswith("row: "):
            name = row.mark.removeprefix("row: ")
            assert text.language == "text"
            assert example_of(row.code.rstrip("\n"), name, tokenizer, tmp_path) == text.code.rstrip("\n")
            seen.add(name)
    assert seen == set(FORMATS)


# Links, sizes, Python


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    text = "[a](README.md) ![b](speed.svg) [c](README.md#install) [d](README.md#instal) [e](https://example.org)"
    assert broken_links(ROOT / "PAGE.md", text) == ["speed.svg", "README.md#instal"]


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("README.md", "messages chat_template assistant_only_loss max_tokens wandb merge"),
        ("recipes/README.md", "chat_template assistant_only_loss merge generate WANDB_PROJECT"),
    ],
)
def test_words_that_newcomers_look_for_are_there(page, words):
    assert [word for word in words.split() if word not in TEXTS[page]] == []


@pytest.mark.parametrize("block", of("python"))
def test_python_compiles(block):
    compile(block.code, "README.md", "exec")


# What is shown is what is printed


def printed(command: str) -> str:
    """Runs a packtrain command in this process, 100 columns wide."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        (words,) = commands(command)
        main(words[1:])
    assert ended.value.code in (None, 0, 1), out.getvalue()  # 1: an audit was asked about what leaks
    return out.getvalue()


def missing_lines(shown_text: str, output: str) -> list[str]:
    """The lines of a shown output that were not printed; `...` stands for anything, alone in a line for whole lines."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    missing = []
    for line in shown_text.splitlines():
        pattern = ".*".join(re.escape(part.strip()) for part in " ".join(line.split()).split("..."))
        if not any(re.fullmatch(pattern, each) for each in lines):
            missing.append(line)
    return missing


def outputs() -> list:
    return [
        pytest.param(block, id=f"{page}:{block.line}")
        for page, block in BLOCKS
        if block.language == "text" and block.mark.startswith("output: ")
    ]


@pytest.mark.ci
@pytest.mark.slow  # tokenises, audits a model
@pytest.mark.parametrize("block", outputs())
def test_outputs_are_what_is_printed(block: Block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    assert missing_lines(block.code, printed(block.mark.removeprefix("output: "))) == []


def test_a_line_that_is_not_printed_is_found():
    assert missing_lines("a  1\n...\nb ... 3\nc", "a 1\nb 2 3\nd") == ["c"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("packtrain init", ["recipe.yaml", "data.path"]),
        ("packtrain keys batching", ["max_tokens", "examples_per_step"]),
        ("packtrain plan quickstart --set num_rows=200 --set eval_size=20", ["balanced", "pad_longest"]),
    ],
)
def test_quick_commands_run_from_an_empty_folder(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = printed(command)
    assert all(word in output for word in words), output
