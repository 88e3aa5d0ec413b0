"""What a run leaves is loaded as it was trained, and an adapter is merged into the same function."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing

from packtrain.errors import PacktrainError
from packtrain.generation import load_trained, merge
from packtrain.generation.prompts import encode_prompts, how_asked, read_prompts
from packtrain.modeling.trained_on import read_trained_on
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, train
from tests.tiny import tiny_model
from tests.training.test_run import RECIPE

LORA = ["lora={target_modules: all-linear, r: 4}", "training.learning_rate=0.05"]


def trained(folder: Path, *overrides: str) -> Path:
    """Trains a tiny recipe; returns its output_dir."""
    (folder / "tiny.yaml").write_text(RECIPE)
    out = folder / "out"
    train(load_recipe(folder / "tiny.yaml", [f"training.output_dir={out}", *overrides]))
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A run with LoRA on a base that was made from scratch."""
    return trained(tmp_path_factory.mktemp("adapter"), *LORA)


def test_an_adapter_of_a_base_from_scratch_is_loaded_with_that_base(adapter):
    """The base is drawn again, with the weights that training began from."""
    ours = load_trained(adapter)
    assert ours.has_adapter and ours.recipe is not None
    base = load_trained(adapter, base=True)
    assert not base.has_adapter
    assert (logits(ours.model) - logits(base.model)).abs().max() > 1e-3
    began = build(load_recipe(adapter.parent / "tiny.yaml", [f"training.output_dir={adapter}-again", *LORA])).model
    with began.disable_adapter():
        assert torch.allclose(logits(began.eval()), logits(base.model), atol=1e-6)


def test_a_base_from_scratch_is_drawn_in_the_dtype_that_it_was_trained_in(tmp_path):
    """Random numbers of bfloat16 are not those of float32, rounded."""
    given = [*LORA, "model.dtype=bfloat16", "max_steps=1", "save_strategy=no"]
    out = trained(tmp_path, *given)
    began = build(load_recipe(tmp_path / "tiny.yaml", [f"training.output_dir={out}-again", *given])).model
    with began.disable_adapter():
        expected = logits(began.eval()).float()
    for dtype in ("auto", "float32"):
        base = load_trained(out, base=True, dtype=dtype).model
        assert (logits(base).float() - expected).abs().max() < 2e-2 * expected.abs().max(), dtype
        assert base.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)


def test_merging_keeps_the_function(adapter, tmp_path):
    """Control: the base alone is another one."""
    ours = load_trained(adapter)
    expected = logits(ours.model)
    difference = merge(ours, tmp_path / "merged")
    assert difference < 1e-5
    merged = load_trained(tmp_path / "merged")
    assert not merged.has_adapter
    assert (logits(merged.model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits(load_trained(adapter, base=True).model) - expected).abs().max() > 1e-3
    with pytest.raises(PacktrainError, match="not an empty folder"):
        merge(ours, tmp_path / "merged")
    with pytest.raises(PacktrainError, match="nothing to merge"):
        merge(merged, tmp_path / "again")


def test_an_adapter_in_a_folder_of_its_own_finds_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.data.helpers import make_tokenizer

    tiny_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = load_trained(tmp_path / "base")
    base.model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    ours = load_trained(tmp_path / "adapter")
    assert isinstance(ours.model, PeftModel)
    assert torch.allclose(logits(ours.model), logits(adapted.eval()))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(PacktrainError, match="the base of .*adapter: is neither a directory here") as refused:
        load_trained(tmp_path / "adapter")
    assert f"`base_model_name_or_path` of {tmp_path / 'adapter/adapter_config.json'}" in (refused.value.fix or "")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(PacktrainError, match="names no base model"):
        load_trained(tmp_path / "adapter")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for target, message in ((tmp_path / "file", "is not a folder"), (tmp_path / "nothing", "is not a folder")):
        with pytest.raises(PacktrainError, match=message):
            load_trained(target)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(PacktrainError, match="without a model yet"):
        load_trained(tmp_path)


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_told_as_it_was_asked_for(tmp_path, monkeypatch):
    """The keys of recipes mean nothing to who has typed `packtrain generate out/run`."""
    from peft import LoraConfig, get_peft_model

    from tests.data.helpers import make_tokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/opposites").mkdir(parents=True)
    for target, fix in (("out/oposites", "did you mean out/opposites?"), ("org/model", "name the output_dir of a run")):
        with pytest.raises(PacktrainError, match="is not a folder here, and as a model of the Hub it is") as caught:
            load_trained(target)
        assert (caught.value.key, caught.value.value) == ("RUN_OR_MODEL", target) and caught.value.fix.startswith(fix)
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "org/base"})
    )
    with pytest.raises(PacktrainError, match=r"^the base of adapter: is not in the local cache"):
        load_trained("adapter")


def test_prompts_of_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"prompt": "one"}, {"messages": turns}, {"prompt": turns[:1]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(tmp_path / "p.jsonl") == ["one", turns[:1], turns[:1]]
    for text, message in (
        ('{"text": "a"}', "line 1: has no `prompt`"),
        ("{", "line 1: is not JSON"),
        ("", "no prompts"),
        ('{"messages": [{"role": "customer", "content": "hi"}]}', "line 1: .*customer"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "line 1: has no `prompt`"),
        ('{"system": "Be short.", "prompt": "hi"}', "line 1: has a column `system`, and would be asked without it"),
        ('{"instruction": "Add.", "input": "2, 2"}', "line 1: has a column `input`, and would be asked without it"),
        ('{"question": ["hi"]}', "line 1: has no `prompt`"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(PacktrainError, match=message):
            read_prompts(tmp_path / "bad.jsonl")


def test_rows_of_questions_and_instructions_are_prompts(tmp_path):
    """The rows that a model was trained on can be asked as they are."""
    rows = [{"question": "2+2?", "answer": "4"}, {"instruction": "Add.", "input": "", "output": "4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(tmp_path / "rows.jsonl") == ["2+2?", "Add."]


def test_prompts_name_speakers_as_rows_of_data_do(tmp_path):
    """Otherwise a template renders a speaker that the model has never met, or leaves the turn out."""
    turns = [{"from": "customer", "value": "hi"}, {"from": "gpt", "value": "yes"}, {"from": "human", "value": "no"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns}))
    (read,) = read_prompts(tmp_path / "p.jsonl", {"customer": "user"})
    assert [(turn["role"], turn["content"]) for turn in read] == [("user", "hi"), ("assistant", "yes"), ("user", "no")]


@pytest.mark.parametrize("inside", ["\x0c", "\x0b", "\x1c", "\x85", "\u2028"])
def test_a_prompt_ends_with_its_line_and_nowhere_else(tmp_path, inside):
    (tmp_path / "p.txt").write_text(f"\ufeffone{inside}two\r\nthree\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [f"one{inside}two", "three"]
    row = json.dumps({"prompt": f"one{inside}two"}, ensure_ascii=False)
    (tmp_path / "p.JSONL").write_text(f"\ufeff{row}\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.JSONL") == [f"one{inside}two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"prompt": "one"}', "is no file of prompts.*\n.*jsonl"),
        ("p.jsonl.gz", "", "is no file of prompts"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: contains a lone surrogate"),
        ("p.jsonl", "[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_a_file_that_holds_no_prompts_is_not_asked(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PacktrainError, match=message):
        read_prompts(tmp_path / name)


def asked(tokenizer, rows: tuple[str, ...], prompt="What is 2+2?") -> str:
    return tokenizer.decode(encode_prompts(tokenizer, [prompt], rows)[0])


def test_what_was_trained_decides_how_a_prompt_is_rendered(adapter, tmp_path):
    """Rows of plain text, although the tokenizer has a chat template; wherever the model lies, and whoever trains it on."""
    merge(load_trained(adapter), tmp_path / "merged")
    copytree(adapter / "model", tmp_path / "elsewhere" / "adapter")
    assert read_trained_on(tmp_path / "elsewhere" / "adapter") == read_trained_on(adapter / "model")
    for place in (adapter, *adapter.glob("checkpoint-*"), tmp_path / "merged"):
        ours = load_trained(place)
        assert ours.tokenizer.chat_template and ours.prompts == ("text",) and not ours.chat
        assert asked(ours.tokenizer, ours.prompts) == "What is 2+2?"
    assert (
        how_asked(ours.tokenizer, ours.prompts)
        == "a prompt is plain text, as in the rows that the model was trained on"
    )
    (tmp_path / "merged" / "packtrain.json").unlink()  # as of a model of another trainer
    ours = load_trained(tmp_path / "merged")
    assert ours.chat and asked(ours.tokenizer, ours.prompts).endswith("<|user|>What is 2+2?<|assistant|>")
    assert "nothing says" in how_asked(ours.tokenizer, ours.prompts)


def test_a_prompt_gets_what_the_tokenizer_puts_in_front_and_nothing_behind():
    from tests.data.helpers import make_tokenizer

    tokenizer = make_tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    assert tokenizer("2+2? ")["input_ids"][-1] == tokenizer.eos_token_id  # what the tokenizer itself does
    (plain,) = encode_prompts(tokenizer, ["2+2? "], ("text",))
    assert plain == [tokenizer.bos_token_id, *tokenizer("2+2? ", add_special_tokens=False)["input_ids"]]
    assert encode_prompts(tokenizer, [f"{bos}2+2? "], ("text",)) == [plain]
    tokenizer.chat_template = None
    assert asked(tokenizer, ("question_answer",), "2+2?").endswith("Question: 2+2?\nAnswer:")
    assert "### Instruction:\n2+2?" in asked(tokenizer, ("alpaca",), "2+2?")
    assert "Question" not in asked(tokenizer, ("question_answer", "text"), "2+2?")


def test_turns_that_the_template_refuses_are_named(adapter):
    ours = load_trained(adapter)
    ours.tokenizer.chat_template = (
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no call before it') }}{% endif %}"
    )
    turns = [[{"role": role, "content": "4"}] for role in ("user", "tool")]
    with pytest.raises(PacktrainError, match="prompt 2: the chat template refuses it: no call before it"):
        encode_prompts(ours.tokenizer, turns, ours.prompts)
