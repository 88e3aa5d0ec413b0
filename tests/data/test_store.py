"""The cache: what is found again, what is not, and that it is found without loading anything heavy."""

from __future__ import annotations

import json
import os
import pickle
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from packtrain.data import store
from packtrain.data.encoding import tokenize
from packtrain.data.examples import Examples, build_examples
from packtrain.data.loading import find_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from packtrain.recipe.sections import DataSection, ModelSection
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer

ROOT = Path(__file__).parents[2]
ROW = {"question": "one", "answer": "two"}


def stores(cache_dir) -> set[str]:
    return {path.name for path in (cache_dir / "tokens").iterdir()}


def find(path, key: str = "tiny", **data) -> tuple[Examples | None, str]:
    return find_examples(DataSection(path=str(path), **data), key, seed=0)


def test_same_rows_and_options_are_tokenised_once(write_rows, tokenizer, cache_dir):
    first = build_examples(open_rows(write_rows(ROW)), tokenizer)
    (name,) = stores(cache_dir)
    written = (cache_dir / "tokens" / name / "tokens.arrow").stat().st_mtime_ns
    moved = build_examples(open_rows(write_rows(ROW, name="moved.jsonl")), tokenizer)  # contents count, not names
    assert moved.fingerprint == first.fingerprint
    assert stores(cache_dir) == {name}
    assert (cache_dir / "tokens" / name / "tokens.arrow").stat().st_mtime_ns == written


def test_whatever_may_change_the_tokens_has_a_store_of_its_own(write_rows, tokenizer, chat_tokenizer):
    def fingerprint(rows=(ROW,), tokenizer=tokenizer, **options) -> str:
        return tokenize(open_rows(write_rows(*rows)), tokenizer, **options).fingerprint

    longer = make_tokenizer(chat_template=CHAT_TEMPLATE + "\n")
    padded = make_tokenizer()
    padded(["one", "one two"], padding=True, truncation=True, max_length=2)  # leaves its mark in the backend
    assert fingerprint() == fingerprint(tokenizer=make_tokenizer()) == fingerprint(tokenizer=padded)
    variants = [
        fingerprint(),
        fingerprint(rows=[ROW, ROW]),
        fingerprint(completion_only_loss=False),
        fingerprint(tokenizer=chat_tokenizer),
        fingerprint(tokenizer=chat_tokenizer, assistant_only_loss=True),
        fingerprint(tokenizer=longer),
        fingerprint(tokenizer=make_tokenizer(bos=False)),
        fingerprint(tokenizer=make_tokenizer(eos_token="<|end|>")),
    ]
    assert len(set(variants)) == len(variants)


def test_examples_are_known_by_their_tokens_whatever_made_them(write_rows, chat_tokenizer):
    """So a run resumes after an upgrade that changes no token."""

    def fingerprint(row: dict, **options) -> str:
        return build_examples(open_rows(write_rows(row)), chat_tokenizer, **options).fingerprint

    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    same = fingerprint({"question": "one", "answer": "two"})
    assert fingerprint({"instruction": "one", "output": "two"}) == same
    assert fingerprint({"messages": messages}, completion_only_loss=True) == same
    others = [
        fingerprint({"messages": messages}),  # other labels
        fingerprint({"messages": [messages[0], messages[1] | {"weight": 0.5}]}, completion_only_loss=True),
        fingerprint({"question": "one", "answer": "three"}),
    ]
    assert len({same, *others}) == 4


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble", "garble the arrays"])
def test_damaged_store_is_made_again(damage, write_rows, tokenizer, cache_dir):
    rows = open_rows(write_rows(ROW))
    before = build_examples(rows, tokenizer)[0]["input_ids"].tolist()
    (directory,) = (cache_dir / "tokens").iterdir()
    if damage == "truncate":
        os.truncate(directory / "tokens.arrow", 100)
    elif damage == "remove":
        (directory / "lengths.npy").unlink()
    elif damage == "garble":
        (directory / "store.json").write_text("{")
    else:
        (directory / "lengths.npy").write_bytes(b"?" * (directory / "lengths.npy").stat().st_size)
    assert build_examples(rows, tokenizer)[0]["input_ids"].tolist() == before


@pytest.mark.parametrize("damage", ["flip a token", "zero the header", "zero the middle", "flip a length"])
def test_damage_that_keeps_the_size_is_seen(damage, write_rows, tokenizer, cache_dir, caplog):
    """Other tokens would be trained on without a word, and what pyarrow says of a file without a header helps nobody."""
    path = write_rows(*[{"question": f"one {n}", "answer": "two"} for n in range(50)])
    before = build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    ids = [row["input_ids"].tolist() for row in before]  # now: the file is mapped
    (directory,) = (cache_dir / "tokens").iterdir()
    file = directory / ("lengths.npy" if damage == "flip a length" else "tokens.arrow")
    contents = bytearray(file.read_bytes())
    if damage == "flip a token":
        contents[contents.index(np.int32(ids[7]).tobytes())] ^= 1
    elif damage == "zero the header":
        contents[:64] = bytes(64)
    elif damage == "zero the middle":
        contents[len(contents) // 2 : len(contents) // 2 + 256] = bytes(256)
    else:
        contents[-4] ^= 1
    file.write_bytes(contents)
    assert "are damaged" in find(path)[1]
    again = build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    assert [row["input_ids"].tolist() for row in again] == ids
    assert again.fingerprint == before.fingerprint and find(path)[1] == ""
    assert caplog.messages == [f"the tokenised rows in {directory} were damaged, and have been tokenised again"]


@pytest.mark.parametrize("damage", ["[]", "{}", "null", '{"files": [], "fingerprint": 1, "counts": []}', "\0"])
def test_a_damaged_request_counts_as_none(damage, write_rows, tokenizer, cache_dir):
    path = write_rows(ROW)
    build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    (request,) = (cache_dir / "requests").iterdir()
    request.write_text(damage)
    assert find(path) == (None, "these rows have not been tokenised with these options yet")
    build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    assert find(path)[1] == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reads_the_cache(tokenizer):
    """Also one who may write nothing there."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are for one user
        os.chmod(folder, 0o755)
        rows = Path(folder, "rows.jsonl")
        rows.write_text(json.dumps(ROW) + "\n")
        tokenizer.save_pretrained(Path(folder, "tokenizer"))
        Path(folder, "others.jsonl").write_text(json.dumps(ROW | {"answer": "six"}) + "\n")
        program = """if True:
            import os
            from transformers import AutoTokenizer
            from packtrain.data.examples import build_examples
            from packtrain.data.sources import open_rows

            def build(path):
                return build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")[0]["input_ids"].tolist()

            tokenizer = AutoTokenizer.from_pretrained("tokenizer")
            first = build("rows.jsonl")
            os.setgid(65534)
            os.setuid(65534)
            print(build("rows.jsonl") == first)
            build("others.jsonl")
            """
        environment = os.environ | {"PACKTRAIN_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
        assert "cannot write to the cache: Permission denied" in done.stderr and "PACKTRAIN_CACHE" in done.stderr


def tokenizer_with(name: str, value: object):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    setattr(tokenizer, name, value)
    return tokenizer


SWITCHES = {name: value for name, value in vars(make_tokenizer()).items() if isinstance(value, bool)}


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_tokenizers_that_give_other_tokens_have_other_fingerprints(name):
    """Whatever switch of a tokenizer is turned: other tokens, other fingerprint."""
    plain, turned = make_tokenizer(chat_template=CHAT_TEMPLATE), tokenizer_with(name, not SWITCHES[name])
    messages = [{"role": "user", "content": "one </s> two"}, {"role": "assistant", "content": " three."}]
    for text in ("one </s> two<|user|> three ", plain.apply_chat_template(messages, tokenize=False)):
        if plain(text)["input_ids"] != turned(text)["input_ids"]:
            assert store.tokenizer_fingerprint(plain) != store.tokenizer_fingerprint(turned)


def test_a_tokenizer_that_splits_special_tokens_has_a_store_of_its_own(write_rows):
    rows = open_rows(write_rows({"text": "one </s> two"}))
    kept = build_examples(rows, make_tokenizer())
    split = build_examples(rows, tokenizer_with("split_special_tokens", True))
    assert kept.fingerprint != split.fingerprint
    assert kept[0]["input_ids"].tolist() != split[0]["input_ids"].tolist()


def test_fingerprints_of_equal_tokenizers_are_equal(tmp_path):
    """Wherever they come from, and whatever has been done with them."""
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    expected = store.tokenizer_fingerprint(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer(
        ["one", "one two"], padding="max_length", truncation=True, max_length=2
    )  # its backend keeps both settings
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    assert store.tokenizer_fingerprint(tokenizer) == expected
    for name in ("here", "there"):
        tokenizer.save_pretrained(tmp_path / name)
    here, there = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("here", "there"))
    assert store.tokenizer_fingerprint(here) == store.tokenizer_fingerprint(there)
    assert store.tokenizer_fingerprint(pickle.loads(pickle.dumps(here))) == store.tokenizer_fingerprint(here)


def test_nothing_half_made_is_left(write_rows, tokenizer, cache_dir):
    rows = open_rows(write_rows(ROW))
    tokenizer_without_eos = make_tokenizer()
    tokenizer_without_eos.eos_token = None
    with pytest.raises(DataError):
        build_examples(rows, tokenizer_without_eos)
    assert stores(cache_dir) == set()
    abandoned = cache_dir / "tokens" / ".staging-dead"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    (cache_dir / "tokens" / ".staging-alive").mkdir()
    build_examples(rows, tokenizer)
    assert {name for name in stores(cache_dir) if name.startswith(".")} == {".staging-alive"}


def test_the_faster_process_wins(write_rows, tokenizer, cache_dir):
    """Publishing what is there already keeps what is there."""
    documents = build_examples(open_rows(write_rows(ROW)), tokenizer)
    (there,) = (cache_dir / "tokens").iterdir()
    with store.staging() as directory:
        (directory / "lengths.npy").write_bytes(b"not to be read")
        published = store.publish(directory, {"fingerprint": there.name, "format": "text"})
    assert published.directory == there and published.lengths.tolist() == documents.lengths.tolist()


def test_unwritable_cache(write_rows, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to the cache.*\n.*PACKTRAIN_CACHE"):
        build_examples(open_rows(write_rows(ROW)), tokenizer, cache_dir=tmp_path / "file")


def test_the_cache_is_named_or_the_platforms_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_root() == tmp_path / "cache"  # PACKTRAIN_CACHE wins, as `cache_dir` above has it
    assert store.cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("PACKTRAIN_CACHE")
    if sys.platform == "linux":
        assert store.cache_root() == tmp_path / "xdg" / "packtrain"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert store.cache_root() == tmp_path / ".cache" / "packtrain"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the home directory is found in other ways")
@pytest.mark.parametrize("named", [None, "~/cache"])
def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch, named):
    """As in a container that runs under a user id that no one entered."""
    for variable in ("HOME", "XDG_CACHE_HOME", "PACKTRAIN_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    if named:
        monkeypatch.setenv("PACKTRAIN_CACHE", named)
    with pytest.raises(DataError, match="no home directory\n.*PACKTRAIN_CACHE"):
        store.cache_root()


def test_rows_that_disappear(write_rows, tokenizer, cache_dir):
    path = write_rows(ROW)
    rows = open_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="tokenising failed: .*No such file.*rows.jsonl"):
        build_examples(rows, tokenizer)
    assert stores(cache_dir) == set()


def test_store_that_disappears(write_rows, tokenizer, cache_dir):
    pickled = pickle.dumps(build_examples(open_rows(write_rows(ROW)), tokenizer))
    assert len(pickle.loads(pickled)) == 1
    shutil.rmtree(cache_dir)
    with pytest.raises(DataError, match="were removed"):
        pickle.loads(pickled)


# --- found without reading rows ----------------------------------------------------------------------------------


def test_request_finds_what_was_built(write_rows, tokenizer):
    path = write_rows(ROW, {"question": "one two", "answer": 3})
    options = dict(completion_only_loss=False, on_bad_row="skip", max_length=64)
    built = build_examples(open_rows(path), tokenizer, **options, tokenizer_key="tiny")
    found, why = find(path, **options)
    assert why == "" and found.fingerprint == built.fingerprint
    assert found.lengths.tolist() == built.lengths.tolist()
    assert found.report == built.report
    assert find(path, **options | {"max_length": 2, "overflow": "truncate"})[0].lengths.max() == 2
    for other in ({"completion_only_loss": None}, {"num_rows": 1}, {"format": "text"}):
        assert find(path, **options | other) == (None, "these rows have not been tokenised with these options yet")
    assert find(path, "other", **options)[0] is None
    with pytest.raises(DataError, match="rows.jsonl, line 2: 'answer' is a number"):
        find(path, completion_only_loss=False)


def test_changed_files_are_named(tmp_path, tokenizer):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "rows" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "rows" / name).write_text(json.dumps(ROW) + "\n")

    def why() -> str:
        return find(tmp_path / "rows")[1]

    build_examples(open_rows(tmp_path / "rows"), tokenizer, tokenizer_key="tiny")
    assert why() == ""
    (tmp_path / "rows/b.jsonl").write_text(json.dumps(ROW) * 2)
    assert "b.jsonl changed after the rows were tokenised (from 37 to 72 bytes)" in why()
    (tmp_path / "rows/b.jsonl").write_text(json.dumps(ROW) + "\n")
    assert "b.jsonl changed after the rows were tokenised (at the same size)" in why()
    (tmp_path / "rows/b.jsonl").unlink()
    assert "b.jsonl was removed" in why()
    build_examples(open_rows(tmp_path / "rows"), tokenizer, tokenizer_key="tiny")
    assert why() == ""
    (tmp_path / "rows/c.jsonl").write_text(json.dumps(ROW) + "\n")
    assert "c.jsonl was added" in why()


def test_removed_store_is_noticed(write_rows, tokenizer, cache_dir):
    path = write_rows(ROW)
    build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    (directory,) = (cache_dir / "tokens").iterdir()
    (directory / "supervised.npy").unlink()
    assert "removed from the cache, or are damaged" in find(path)[1]


def test_tokenizer_key(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")

    def key(name: str | None = None, **model) -> str:
        return store.tokenizer_key(ModelSection(model_name_or_path=name, **model))

    keys = [
        key("a/b"),
        key("a/c"),
        key("a/b", revision="1"),
        key("a/b", chat_template=str(template)),
        key(tokenizer_vocab_size=512),
        key(str(directory)),
    ]
    (directory / "tokenizer.json").write_text("{ }")
    (directory / "weights.bin").write_text("not the tokenizer's")
    template.write_text("{{ messages[0] }}")
    keys += [key(str(directory)), key("a/b", chat_template=str(template))]
    assert len(set(keys)) == len(keys)
    assert key("a/b") == keys[0]


# --- what is imported --------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pandas", "tokenizers")


def imported(code: str, *arguments: object) -> set[str]:
    """Heavy packages in a fresh interpreter after running `code`."""
    report = f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(eval(done.stdout.splitlines()[-1]))


def test_finding_lengths_loads_nothing_heavy(write_rows, tokenizer):
    path = write_rows(ROW)
    build_examples(open_rows(path), tokenizer, tokenizer_key="tiny")
    code = (
        "import sys\nfrom packtrain.data.loading import find_examples\n"
        "from packtrain.recipe.sections import DataSection\n"
        "examples, why = find_examples(DataSection(path=sys.argv[1]), 'tiny', seed=0)\n"
        "assert examples.lengths.sum() and examples.report.lines(), why"
    )
    assert imported(code, path) == set()
    assert imported("import pyarrow") >= {"pyarrow"}  # the check sees what it looks for


def test_tokenising_does_not_load_torch(write_rows, chat_tokenizer, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys\nfrom packtrain.data.examples import build_examples\n"
        "from packtrain.data.sources import open_rows\nfrom transformers import PreTrainedTokenizerFast\n"
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])\n"
        "assert build_examples(open_rows(sys.argv[1]), tokenizer)[0]"
    )
    if "torch" in imported("from transformers import PreTrainedTokenizerFast"):
        pytest.skip("this version of transformers imports torch with its tokenizers")
    loaded = imported(code, write_rows(ROW), tmp_path / "tokenizer")
    assert {"transformers", "datasets"} <= loaded and "torch" not in loaded
