"""What is refused, and in which words: recipes, data files, commands; and every message that the code holds."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import packtrain
from packtrain import PackCollator, errors, load_recipe, make_plan
from packtrain.cli import main
from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import PacktrainError, RecipeError
from packtrain.modeling.tokenizer import train_bpe
from tests.golden.store import HERE, exit_code, load, plain, save

BASE = """\
model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
                 num_attention_heads: 2}, tokenizer_vocab_size: 300}
data: {path: "packtrain:arithmetic", num_rows: 20}
batching: {strategy: balanced, examples_per_step: 4, max_tokens: 4096}
training: {output_dir: out, max_steps: 2, use_cpu: true, report_to: none}
"""
PRETRAINED = ["model.config=null", "model.tokenizer_vocab_size=null", "model.model_name_or_path=org/name"]
MASKED = ["objective.name=masked_diffusion", "objective.tail=rainbow", "objective.canvas=batch_max"]

TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# nothing\n",
    "a list": "- model\n- data\n",
    "a word": "model\n",
    "bad YAML": "model: {config: [1, 2\ndata: x\n",
    "a tab": "model:\n\tconfig: 1\n",
    "a colon in text": "data: {path: a: b}\n",
    "a duplicate key": BASE + "data: {path: rows.jsonl}\n",
    "a duplicate key within": BASE.replace("num_rows: 20", "num_rows: 20, num_rows: 30"),
    "an alias": BASE.replace("num_rows: 20", "num_rows: &n 20, max_length: *n"),
    "a merge": BASE + "lora: {<<: {r: 4}}\n",
    "a tag": BASE.replace("num_rows: 20", "num_rows: !!python/object:os.system 20"),
    "a number as key": BASE.replace("num_rows: 20", "20: num_rows"),
    "too deep": BASE + "lora: " + "{a: " * 40 + "1" + "}" * 40 + "\n",
    "not UTF-8": b"model: \xff\n",
    "two documents": BASE + "---\n" + BASE,
    "a lone surrogate": BASE.replace("num_rows: 20", 'name: "\\ud800"'),
    "no data": BASE.replace('data: {path: "packtrain:arithmetic", num_rows: 20}\n', ""),
    "no path": BASE.replace('path: "packtrain:arithmetic", ', ""),
    "no output_dir": BASE.replace("output_dir: out, ", ""),
    "no model": BASE.partition("data:")[1] + BASE.partition("data:")[2],
    "no training": BASE.partition("training:")[0],
    "an unknown section": BASE + "optimizer: {lr: 1}\n",
    "a misspelled section": BASE.replace("batching:", "bacthing:"),
    "a section that is a list": BASE.replace("batching: {strategy", "batching: [{strategy").replace("4096}", "4096}]"),
    "an empty lora": BASE + "lora:\n",
    "many at once": BASE.replace("4096}", "many, examples_per_stpe: 4}").replace("max_steps: 2", "max_steps: 0, lr: x"),
    "yes for true": BASE.replace("use_cpu: true", "use_cpu: yes"),
}
OVERRIDES: dict[str, list[str]] = {
    # keys
    "an unknown key": ["batching.colour=red"],
    "a misspelled key": ["batching.max_token=8"],
    "a misspelled key of training": ["training.learnign_rate=1e-4"],
    "a misspelled key of lora": ["lora.lora_alhpa=8"],
    "a key of another section": ["data.examples_per_step=8"],
    "a key without a section": ["colour=red"],
    "a key of several sections": ["revision=main"],
    "another trainer's words": [
        "training.batch_size=8",
        "batching.packing=true",
        "data.max_seq_length=9",
        "training.lr=1",
    ],
    "older words": ["training.warmup_ratio=0.1", "training.no_cuda=true", "model.torch_dtype=float16"],
    "not an override": ["batching.max_tokens", "=3", "a..b=1"],
    "below a value": ["data.num_rows.x=3"],
    "an override of bad YAML": ["batching.max_tokens={"],
    "a section taken away": ["data=null"],
    # types
    "text for a number": ["batching.max_tokens=many"],
    "a number with commas": ["batching.max_tokens=16,384"],
    "a fraction": ["batching.examples_per_step=2.5"],
    "zero": ["batching.examples_per_step=0"],
    "negative": ["data.max_length=-1"],
    "a truth value for a number": ["data.num_rows=true"],
    "yes": ["data.assistant_only_loss=yes"],
    "a number for text": ["data.split=7"],
    "empty text": ["data.path=''"],
    "blank text": ["data.format='  '"],
    "no choice": ["data.overflow=cut", "data.on_bad_row=skipp", "model.dtype=fp8"],
    "no objective": ["objective.name=maskd_diffusion"],
    "no tail": ["objective.tail=rainbows"],
    "a list for a mapping": ["model.config=[1]"],
    "a small vocabulary": ["model.tokenizer_vocab_size=10"],
    "a share above 1": ["data.eval_size=1.5"],
    "a seed too large": ["training.seed=4294967296"],
    "workers below 0": ["training.dataloader_num_workers=-1"],
    "no accumulation": ["training.gradient_accumulation_steps=0"],
    "no learning rate": ["training.learning_rate=fast"],
    "not finite": ["training.learning_rate=.nan"],
    "lora's rank": ["lora.r=four"],
    "a list of numbers": ["objective.pad_tokens=[1, 2]"],
    # decided by the plan
    "a batch size": ["training.per_device_train_batch_size=8", "training.per_device_eval_batch_size=8"],
    "decided": ["training.dataloader_drop_last=true", "training.remove_unused_columns=true", "training.use_cache=true"],
    "decided too": [
        "training.label_smoothing_factor=0.1",
        "training.auto_find_batch_size=true",
        "training.do_eval=true",
    ],
    "decided as well": ["training.resume_from_checkpoint=x", "training.disable_tqdm=false", "training.do_predict=true"],
    "a secret": ["training.hub_token=hf_abcdefghijklmnopqrstuvwxyz012345"],
    "a secret misspelled": ["training.hub_tokn=hf_abcdefghijklmnopqrstuvwxyz012345"],
    # contradictions
    "accelerate's loader": ["training.accelerator_config={split_batches: true, even_batches: false}"],
    "noise by rows": ["training.neftune_noise_alpha=5"],
    "a path upwards": ["training.output_dir=../out"],
    "a path with a variable": ["training.output_dir=$HOME/out", "training.run_name='a\\tb'"],
    "two precisions": ["training.bf16=true", "training.fp16=true"],
    "skipping with a scaler": ["training.fp16=true", "batching.on_nonfinite=skip"],
    "no epoch": ["training.num_train_epochs=0", "training.max_steps=-1"],
    "no step": ["training.max_steps=0"],
    "too many epochs": ["training.num_train_epochs=1000000"],
    "two models": ["model.model_name_or_path=org/name"],
    "no model": ["model.config=null"],
    "no architecture": ["model.config={hidden_size: 16}"],
    "two tokenizers": ["model.tokenizer_name_or_path=org/name"],
    "a tokenizer for a pretrained model": [*PRETRAINED, "model.tokenizer_vocab_size=300"],
    "no tokenizer": ["model.tokenizer_vocab_size=null"],
    "a revision of nothing": ["model.revision=main"],
    "remote code": [*PRETRAINED, "model.trust_remote_code=true", "model.revision=main"],
    "two evaluations": ["data.eval_size=3", "data.eval_path=x.jsonl", "data.eval_split=test"],
    "evaluation on what is trained on": ["data.eval_split=train"],
    "evaluation on the same path": ["data.eval_path='packtrain:arithmetic'"],
    "no evaluation data": ["training.eval_strategy=steps", "training.load_best_model_at_end=true"],
    "kept by nothing": ["data.keep={by: el2n, share: 0.7, seed: 3}"],
    "kept by a length": ["data.keep={by: length, share: 2, whihc: low}"],
    "kept at random by a score": ["data.keep={by: random, share: 0.7, which: low, scores: x.parquet}"],
    "a schedule of packs, out of order": [
        "strategy=bfd",
        "batching.schedule=[{until: 0.4, max_length: 100}, {until: 0.1, max_length: 64}]",
    ],
    "a share of a mixture": [
        "data.path=null",
        "data.mixture=[{path: a, weight: 1}]",
        "data.keep={share: 0.5, by: random}",
    ],
    "a long example": ["data.max_length=8192"],
    "too long": ["data.max_length=100000000", "batching.max_tokens=100000000"],
    "too long, wrapped": ["data.max_length=8192", "batching.strategy=wrapped"],  # is fine
    # objectives
    "keys of masked diffusion": ["objective.tail=eos", "objective.canvas=fixed", "objective.shift=true"],
    "keys of block diffusion": ["objective.block_size=8"],
    "a weighting of diffusion": [*MASKED, "objective.loss_weighting=example"],
    "a tail of block diffusion": ["objective.name=block_diffusion", "objective.tail=eos"],
    "wrapped diffusion": ["objective.name=block_diffusion", "batching.strategy=wrapped"],
    "wrapped masks": [*MASKED, "batching.strategy=wrapped"],
    "a tail without a canvas": [*MASKED, "objective.canvas=null"],
    "a canvas without a tail": [*MASKED, "objective.tail=none"],
    "a canvas without a size": [*MASKED, "objective.canvas=fixed"],
    "a size too many": [*MASKED, "objective.canvas_size=64"],
    "cut answers": [*MASKED, "data.overflow=truncate"],
    "split answers": [*MASKED, "data.overflow=split"],
    "remote code and filler": [*PRETRAINED, "model.trust_remote_code=true", f"model.revision={'0' * 40}", *MASKED],
}
COMMANDS: dict[str, list[str]] = {
    "a misspelled strategy": ["train", "RECIPE", "--set", "batching.strategy=balancd"],
    "no such strategy": ["plan", "RECIPE", "--set", "batching.strategy=zzzz"],
    "a strategy of no module": ["train", "RECIPE", "--set", "batching.strategy=nowhere.at_all:function"],
    "a strategy that is no function": ["train", "RECIPE", "--set", "batching.strategy=math:pi"],
    "no such recipe": ["train", "nowhere.yaml"],
    "no such file": ["train", "RECIPE", "--set", "data.path=nowhere.jsonl"],
    "no such split": ["train", "RECIPE", "--set", "data.split=middle"],
    "no such architecture": ["train", "RECIPE", "--set", "model.config={model_type: lama}"],
    "a setting of no architecture": ["train", "RECIPE", "--set", "model.config.hidden_size=many"],
    "no such attention": ["train", "RECIPE", "--set", "model.attn_implementation=sdpaa"],
    "nothing to resume": ["train", "RECIPE", "--resume"],
    "no such checkpoint": ["train", "RECIPE", "--resume", "nowhere"],
    "no micro-batches": ["train", "RECIPE", "--set", "training.gradient_accumulation_steps=1", "--set",
                         "batching.max_tokens=2048", "--set", "batching.examples_per_step=20"],
    "tokens by step": ["plan", "RECIPE", "--set", "batching.tokens_per_step=4096"],
    "too long examples": ["train", "RECIPE", "--set", "data.max_length=32"],
    "all held out": ["train", "RECIPE", "--set", "data.eval_size=20"],
    "none kept": ["train", "RECIPE", "--set", "data.keep={by: random, share: 0.01}"],
    "too few short examples": ["plan", "RECIPE", "--set", "batching.schedule=[{until: 0.9, max_length: 40}]"],
    "no such scores": ["train", "RECIPE", "--set", "data.keep={by: loss, share: 0.5, scores: nowhere.parquet}"],
    "scores of no model": ["score", "RECIPE", "--model", "./nowhere"],
    "scores of pairs": ["score", "RECIPE", "--set", "objective.name=preference"],
    "scores in the place of a recipe": ["score", "RECIPE", "--out", "RECIPE"],
    "padded blocks": ["train", "RECIPE", "--set", "objective.name=block_diffusion", "--set",
                      "batching.strategy=pad_longest", "--set", "data.overflow=drop"],
    "a canvas of the epoch": ["train", "RECIPE", *(part for word in MASKED for part in ("--set", word)), "--set",
                              "batching.strategy=bfd", "--set", "data.overflow=drop"],
    "no such module for lora": ["train", "RECIPE", "--set", "lora={r: 4, target_modules: [nothing]}"],
    "a bad training argument": ["train", "RECIPE", "--set", "training.lr_scheduler_type=diagonal"],
    "fp16 on a CPU": ["train", "RECIPE", "--set", "training.fp16=true"],
    "no such launch file": ["train", "RECIPE", "--launch", "nowhere"],
    "nothing to plan": ["plan"],
    "a strategy with a recipe": ["plan", "RECIPE", "--strategy", "bfd"],
    "no such step": ["show", "RECIPE", "--step", "99"],
    "no such example": ["show", "RECIPE", "--examples", "99"],
    "no memory": ["plan", "RECIPE", "--memory", "much"],
}  # fmt: skip
FILES: dict[str, dict[str, str | bytes]] = {  # name of the case -> the files of a directory; the first one is opened
    "nothing in it": {"a.jsonl": ""},
    "no JSON": {"a.jsonl": "hello\nyou\n"},
    "one broken line": {"a.jsonl": '{"text": "x y"}\n{"text": \n{"text": "z"}\n[1]\n'},
    "no UTF-8": {"a.jsonl": b'{"text": "\xff"}\n{"text": "x y"}\n'},
    "unknown columns": {"a.jsonl": '{"query": "x", "response": "y"}\n'},
    "pairs of answers": {"a.jsonl": '{"chosen": "x", "rejected": "y"}\n'},
    "a broken array": {"a.json": '[{"text": "x"}, {"text": \n'},
    "an object": {"a.json": '{"text": {"a": "x"}}'},
    "a CSV without a header": {"a.csv": "\n1,2\n"},
    "a CSV with the same column twice": {"a.csv": "text,text\nx,y\n"},
    "a CSV with too many fields": {"a.csv": "text\nx y\nx,y\n"},
    "an open quote": {"a.csv": 'text\nx y\n"x\n'},
    "no Parquet": {"a.parquet": "PAR1 no"},
    "an unknown kind": {"a.xyz": "x"},
    "too short": {"a.jsonl": '{"text": "x"}\n{"prompt": "x"}\n'},
    "token ids out of the vocabulary": {"a.jsonl": '{"input_ids": [1, 2, 100000]}\n{"input_ids": [-1, 2]}\n'},
    "token ids of fractions": {"a.jsonl": '{"input_ids": [1.5, 2]}\n'},
    "masks of another length": {"a.jsonl": '{"input_ids": [1, 2], "completion_mask": [1]}\n'},
    "padding": {"a.jsonl": '{"input_ids": [1, 2], "attention_mask": [1, 0]}\n'},
    "no messages": {"a.jsonl": '{"messages": [{"role": "user"}]}\n{"messages": {"role": "user"}}\n'},
    "an unknown speaker": {"a.jsonl": '{"conversations": [{"from": "x", "value": "y"}]}\n'},
    "a picture": {"a.jsonl": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n'},
    "broken tools": {"a.jsonl": '{"messages": [{"role": "user", "content": "x"}], "tools": "{"}\n'},
    "many bad rows": {"a.jsonl": '{"text": 3}\n' * 14},
    "several kinds": {".": "", "a.jsonl": '{"text": "x y"}\n', "b.csv": "text\nx\n"},
    "no data files": {".": "", "a.xyz": "x"},
    "only a test split": {".": "", "test.jsonl": '{"text": "x y"}\n'},
    "a damaged dataset": {".": "", "state.json": "{}", "dataset_info.json": "{"},
}
BUILDS: dict[str, dict] = {
    "an unknown format": dict(format="messagess"),
    "a format without its columns": dict(format="messages"),
    "no overflow": dict(overflow="cut"),
    "no on_bad_row": dict(on_bad_row="ignore"),
    "a short max_length": dict(max_length=1),
    "an example too long": dict(max_length=3),
    "nothing left": dict(max_length=2, overflow="drop"),
}
PLANS: dict[str, dict] = {
    "no examples": dict(lengths=[]),
    "an empty example": dict(lengths=[3, 0]),
    "lengths of fractions": dict(lengths=[1.5]),
    "lengths below 0": dict(lengths=[3, -1]),
    "lengths of two dimensions": dict(lengths=[[1, 2]]),
    "a misspelled strategy": dict(lengths=[3], strategy="bdf"),
    "no tokens": dict(lengths=[3], max_tokens=0),
    "a long example": dict(lengths=[3, 99], max_tokens=50),
    "a width above the tokens": dict(lengths=[3], max_length=60, max_tokens=50, strategy="pad_max"),
    "no epochs": dict(lengths=[3], num_epochs=0),
    "too many steps": dict(lengths=[3], max_steps=10**9),
    "documents of step scope": dict(lengths=[3], max_documents=2),
    "tokens of step scope": dict(lengths=[3], tokens_per_step=2),
    "equal lengths of the epoch": dict(lengths=[3], strategy="bfd", equal_lengths=True),
}
COLLATORS: dict[str, tuple[dict, list]] = {
    "no layout": (dict(layout="round"), []),
    "no weighting": (dict(loss_weighting="all"), []),
    "no width": (dict(padded_to="max_length"), []),
    "a document too long": (dict(layout="padded", padded_to="max_length", max_length=2), [{"input_ids": [1, 2, 3]}]),
    "labels of another length": ({}, [{"input_ids": [1, 2, 3], "labels": [1]}]),
    "an empty document": ({}, [{"input_ids": []}]),
    "a mask of another length": ({}, [{"input_ids": [1, 2], "completion_mask": [1]}]),
    "padding in the middle": ({}, [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}]),
    "labels on padding": ({}, [{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}]),
    "a packed row": ({}, [{"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}]),
    "an unknown list": ({}, [{"input_ids": [1, 2], "token_weights": [0.5, 1.0]}]),
}


def _placeless(text: str | None, directory: Path) -> str | None:
    return text and text.replace(f"{directory}/", "").replace(str(directory), "DIRECTORY")


def recipes(directory: Path) -> dict:
    """Every problem of every bad recipe: its place, key, what is wrong and the fix."""
    cases: dict[str, tuple[str | bytes, Sequence[str]]] = {
        **{f"text: {name}": (text, ()) for name, text in TEXTS.items()},
        **{f"override: {name}": (BASE, overrides) for name, overrides in OVERRIDES.items()},
    }
    path = directory / "recipe.yaml"
    values: dict[str, Any] = {}
    for name, (text, overrides) in cases.items():
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        try:
            load_recipe(path, overrides)
            values[name] = "fine"
        except RecipeError as error:
            values[name] = [
                [_placeless(part, directory) for part in (problem.where, problem.key, problem.what, problem.fix)]
                for problem in error.problems
            ]
    return values


def commands(directory: Path, capture: Any) -> dict:
    """Exit code and standard error of commands that can't be done."""
    (directory / "recipe.yaml").write_text(BASE)
    values = {}
    before = os.getcwd()
    os.chdir(directory)
    try:
        for name, command in COMMANDS.items():
            capture.readouterr()
            code = exit_code(main, [word.replace("RECIPE", "recipe.yaml") for word in command])
            said = capture.readouterr().err
            start = re.search(r"(?m)^(error|stopped)", said)  # libraries warn before it
            values[name] = [code, _placeless(said[start.start() :].rstrip() if start else "", directory)]
    finally:
        os.chdir(before)
    return values


def _refusal(function, directory: Path) -> str:
    try:
        function()
    except PacktrainError as error:
        return f"{type(error).__name__}: {_placeless(str(error), directory)}"
    return "fine"


def data(directory: Path) -> dict:
    tokenizer = train_bpe(["one two three"], 300)
    cache = directory / "cache"
    values = {}
    for name, files in FILES.items():
        inside = directory / re.sub(r"\W+", "_", name)
        inside.mkdir()
        for file, content in files.items():
            if file != ".":
                (inside / file).write_bytes(content.encode() if isinstance(content, str) else content)
        opened = inside / next(iter(files))

        def build(opened=opened):
            build_examples(open_rows(opened), tokenizer, cache_dir=cache)

        values[f"file: {name}"] = _refusal(build, inside)
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two three", "three two one two")))
    for name, options in BUILDS.items():
        values[f"build: {name}"] = _refusal(
            lambda options=options: build_examples(open_rows(path), tokenizer, cache_dir=cache, **options), directory
        )
    for name, options in {"split": dict(split="test"), "path": dict()}.items():
        opened = path if options else directory / "nowhere.jsonl"
        values[f"open: no such {name}"] = _refusal(
            lambda opened=opened, options=options: open_rows(opened, **options), directory
        )
    return values


def plans(directory: Path) -> dict:
    found = {
        f"plan: {name}": _refusal(lambda options=options: make_plan(**options), directory)
        for name, options in PLANS.items()
    }
    for name, (options, features) in COLLATORS.items():
        found[f"collator: {name}"] = _refusal(
            lambda options=options, features=features: PackCollator(**options)(features), directory
        )
    return found


# Messages in the code, wherever they stand.

MESSAGES = HERE / "messages.txt"
_REFUSALS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
_REFUSALS |= {"BadRow", "bad_rows_error"}
_ARGUMENTS = ("what", "fix")


def _literals(node: ast.AST) -> Iterator[str]:
    """Texts below a node, f-strings with `{}` for what is filled in; only what reads as words."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        text = "".join(str(part) for part in parts)
        if re.search(r"[a-z] ", text) or re.search(r" [a-z]", text):
            yield text
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and re.search(r"\w \w", node.value):
            yield node.value
    else:
        for below in ast.iter_child_nodes(node):
            yield from _literals(below)


def _messages_of(tree: ast.AST) -> Iterator[str]:
    """Of every error made and every `what=` or `fix=` said in a module; of names, whatever is assigned to them."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            continue
        own = list(_within(scope))
        assigned: dict[str, list[ast.AST]] = {}
        for node in own:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    for name, value in _pairs(target, node.value):
                        assigned.setdefault(name, []).append(value)
        told: dict[int, ast.AST] = {}  # by identity: a value that is told twice is one message
        for name in _ARGUMENTS:
            told |= {id(value): value for value in assigned.get(name, ())}
        for node in own:
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            values = [keyword.value for keyword in node.keywords if keyword.arg in _ARGUMENTS]
            values += node.args if called in _REFUSALS else []
            for value in values:
                told[id(value)] = value
                for name in (below.id for below in ast.walk(value) if isinstance(below, ast.Name)):
                    told |= {id(known): known for known in assigned.get(name, ())}
        inner = {id(below) for value in told.values() for below in ast.walk(value) if below is not value}
        for key, value in told.items():
            if key not in inner:
                yield from _literals(value)
        for node in own:  # the rules of recipes yield (key, what, fix)
            if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                yield from _literals(node.value)


def _within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope without those of the functions in it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _within(node)


def _pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _pairs(one, other)


def _trees() -> Iterator[ast.Module]:
    for path in sorted(Path(packtrain.__file__).parent.rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _lines(texts: Iterator[str]) -> list[str]:
    return [text.replace("\\", "\\\\").replace("\n", "\\n") for text in texts]


def _listed(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


class _Capture:
    """What pytest's capsys does, for `store`."""

    def __init__(self):
        import io
        import sys

        self.sys, self.make = sys, io.StringIO
        sys.stderr, sys.stdout = self.make(), self.make()

    def readouterr(self) -> Any:
        self.err = self.sys.stderr.getvalue()
        self.sys.stderr, self.sys.stdout = self.make(), self.make()
        return self

    def close(self) -> None:
        self.sys.stderr, self.sys.stdout = self.sys.__stderr__, self.sys.__stdout__


def computed(kind: str, directory: Path, capture: Any) -> dict:
    inside = directory / kind
    inside.mkdir()
    found = commands(inside, capture) if kind == "commands" else KINDS[kind](inside)
    return {f"{kind}: {name}": plain(value) for name, value in found.items()}


KINDS = {"recipes": recipes, "commands": commands, "data": data, "plans": plans}


def store(directory: Path) -> None:
    capture = _Capture()
    try:
        values = {case: value for kind in KINDS for case, value in computed(kind, directory, capture).items()}
    finally:
        capture.close()
    save("errors", values)
    messages = _lines(text for tree in _trees() for text in _messages_of(tree))
    MESSAGES.write_text("".join(f"{line}\n" for line in sorted(messages)), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_those_stored(kind, tmp_path, capsys):
    stored = {case: value for case, value in load("errors").items() if case.startswith(f"{kind}: ")}
    found = computed(kind, tmp_path, capsys)
    assert found.keys() == stored.keys()
    for case, value in stored.items():
        assert found[case] == value, case


def test_every_message_is_listed():
    """messages.txt holds what users may read, to be read in one go: `python -m tests.golden.store errors` writes it."""
    here = set(_lines(text for tree in _trees() for text in _messages_of(tree)))
    listed = set(_listed(MESSAGES))
    assert here == listed, "\n".join(
        [*(f"- {line}" for line in listed - here), *(f"+ {line}" for line in here - listed)]
    )
