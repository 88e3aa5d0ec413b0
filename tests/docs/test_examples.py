"""The Python in the documentation does what it says."""

from __future__ import annotations

import gzip
import io
import json
import shlex
from contextlib import redirect_stdout

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

import packtrain
from packtrain.cli import main
from packtrain.errors import DataError, LaunchError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives.task import load_task
from packtrain.packing.plan import make_plan
from packtrain.training.deepspeed_config import deepspeed_config
from packtrain.training.run import build
from packtrain.training.trainer import PackTrainer
from tests.docs.markdown import ROOT, blocks
from tests.tiny import tiny_model

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, max_position_embeddings: 256}
  tokenizer_vocab_size: 300
data: {path: packtrain:arithmetic, num_rows: 40, max_length: 128, overflow: drop}
batching: {strategy: pad_longest, examples_per_step: 8, max_tokens: 512}
training: {output_dir: out, learning_rate: 1e-2, num_train_epochs: 2, lr_scheduler_type: constant, logging_steps: 1,
  save_strategy: "no"}
"""


MY_RUN = """
model: {model_name_or_path: base}
data: {path: rows.jsonl, max_length: 64, eval_size: 4}
batching: {examples_per_step: 4, max_tokens: 64}
lora: {r: 4, lora_alpha: 64, target_modules: all-linear}
training: {output_dir: out/my_run, learning_rate: 1e-2, num_train_epochs: 30, lr_scheduler_type: constant,
  save_strategy: "no"}
"""


def example(page: str, name: str) -> str:
    """The block that stands below `<!-- example: NAME -->` in a page."""
    return marked(page, f"example: {name}")


def marked(page: str, mark: str) -> str:
    """The block that stands below `<!-- MARK -->` in a page."""
    (block,) = [each for each in blocks((ROOT / page).read_text(encoding="utf-8")) if each.mark == mark]
    return block.code


class Logged(PackTrainer):
    """Keeps the loss of every update."""

    losses: list[float] = []

    def log(self, logs, *args):
        if "loss" in logs:
            Logged.losses.append(logs["loss"])
        super().log(logs, *args)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_own_loop_has_the_losses_of_train(folder):
    """Even of padded batches; control: a mean per micro-batch, which the page warns of, has others."""
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = packtrain.load_recipe("recipe.yaml")
    Logged.losses = []
    packtrain.train(recipe, trainer_class=Logged)

    def losses(code: str) -> list[float]:
        trainer = build(recipe)  # the same first weights
        scope = {"model": trainer.model.train()}
        exec(code, scope)
        assert scope["plan"].gradient_accumulation_steps > 1
        return scope["losses"]

    code = example("recipes/README.md", "own loop")
    assert len(Logged.losses) > 4
    np.testing.assert_allclose(losses(code), Logged.losses, atol=1e-5, rtol=0)
    per_micro_batch = code.replace("/ denominator", "/ (weights.sum() * len(batches))")
    assert per_micro_batch != code
    assert np.abs(np.array(losses(per_micro_batch)) - Logged.losses).max() > 1e-3


def test_a_trained_adapter_answers_is_merged_and_trained_further(folder, capsys):
    """The commands of the page, line by line."""
    tokenizer = train_bpe(["2+2? 4 3+3? 6"] * 20, vocab_size=300)
    base = tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    (folder / "rows.jsonl").write_text('{"prompt": "2+2? ", "completion": "4"}\n' * 16)
    (folder / "asked.jsonl").write_text('{"prompt": "2+2? "}\n{"prompt": "3+3? "}\n')
    (folder / "mine.py").write_text("def score(answer, reference):\n    return 0.25\n")
    (folder / "my_run.yaml").write_text(MY_RUN)
    packtrain.train(packtrain.load_recipe("my_run.yaml"))
    lines = example("recipes/README.md", "after training").splitlines()
    said = {}
    capsys.readouterr()
    for words in (shlex.split(line, comments=True)[1:] for line in lines):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, words
        said[words[0], words[2]] = capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in open("answers.jsonl")] == ["2+2? ", "3+3? "]
    assert "wrote 2 answers" in said["generate", "--prompts"]
    assert "score    100.0% of 4 prompts" in said["evaluate", "--prompts"]
    assert "score    25.0% of 4 prompts" in said["evaluate", "--base"]
    answered = {}
    with redirect_stdout(io.StringIO()) as out:
        exec(example("recipes/README.md", "generate"), answered)
    assert said["generate", "--prompt"].strip() == "4" and "2+2? 4" in out.getvalue()

    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained("out/merged")  # nothing else is needed
    ids = torch.tensor([tokenizer("2+2? 4")["input_ids"]])
    logits = [model(ids).logits for model in (answered["model"], alone, base)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-3  # control: the base model answers otherwise

    recipe = yaml.safe_load(MY_RUN) | yaml.safe_load(example("recipes/README.md", "going on"))
    recipe["training"]["output_dir"] = "out/second"
    del recipe["lora"]
    (folder / "second.yaml").write_text(yaml.safe_dump(recipe))
    first = json.loads((folder / "out/my_run/summary.json").read_text())
    second = packtrain.train(packtrain.load_recipe("second.yaml"))
    assert second.held_out_loss_before == pytest.approx(first["held_out_loss_after"], rel=1e-5)


def test_a_stream_resumes_bitwise(folder):
    """Of 8 updates, from a checkpoint after the third, over the end of the rows; control: from their beginning."""
    rows = [{"input_ids": list(range(3, 30 + 7 * (n % 9)))} for n in range(24)]
    code = example("recipes/README.md", "stream")
    settings = SETTINGS | {"learning_rate": 1e-2}
    settings = {key: settings[key] for key in ("use_cpu", "report_to", "disable_tqdm", "learning_rate")}

    def weights(code: str, resume: str | None) -> torch.Tensor:
        scope = {"rows": rows, "resume": resume, "model": tiny_model("llama", vocab_size=128), "settings": settings}
        exec(code, scope)
        assert scope["trainer"].state.global_step == 8
        return torch.cat([weight.detach().flatten() for weight in scope["model"].parameters()])

    unbroken = weights(code, None)
    assert torch.equal(weights(code, "out/checkpoint-3"), unbroken)
    forgetful = code.replace("packs.load_state_dict", "str")
    assert forgetful != code and not torch.equal(weights(forgetful, "out/checkpoint-3"), unbroken)


def test_the_mixture_is_what_it_says(folder):
    (folder / "chats").mkdir()
    for i in range(2):
        rows = [{"prompt": f"{i}-{j}?", "completion": "yes"} for j in range(20)]
        (folder / f"chats/{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (folder / "sums.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n' * 460)
    recipe = yaml.safe_load(RECIPE) | yaml.safe_load(example("recipes/README.md", "mixture"))
    recipe["batching"]["max_tokens"] = recipe["data"]["max_length"] = 4096
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    task = load_task(packtrain.load_recipe("recipe.yaml"))
    shares = task.train.report.mixture
    assert [share.available for share in shares] == [38, 437, 475] and len(task.held_out) == 2 + 23 + 25
    assert [share.examples for share in shares] == [665, 190, 95] and len(task.train) == 950
    assert [file for file, _ in task.train.report.files][:2] == ["chats/0.jsonl.gz", "chats/1.jsonl.gz"]


def test_the_strategy_packs_pairs(folder, sft_lengths):
    (folder / "my_packing.py").write_text(example(".github/CONTRIBUTING.md", "strategy"))
    plan = make_plan(sft_lengths, strategy="my_packing:pairs", max_tokens=1024)
    packs = [pack for step in range(plan.total_steps) for pack in plan.layout_of(step) if len(pack)]
    assert max(map(len, packs)) == 2 and sum(map(len, packs)) == len(sft_lengths)


def test_own_strategies_of_both_scopes_do_what_the_page_says(folder, sft_lengths):
    """Packs fit, are others in each epoch and the same again; the one of step scope keeps the updates."""
    (folder / "page_packing.py").write_text(
        example("recipes/README.md", "own strategy") + example("recipes/README.md", "own strategy of step scope")
    )

    def updates(name: str, **more) -> list[list]:
        size = {"max_tokens": 4096, "examples_per_step": 64, "num_epochs": 2, "world_size": 2}
        plan = make_plan(sft_lengths.astype(np.uint16), strategy=name, **size | more)
        assert plan.layout == "flat"
        steps = [plan.layout_of(step) for step in range(plan.total_steps)]
        assert max(part.lengths.sum() for parts in steps for part in parts) <= 4096
        seen = np.concatenate([part.example_ids for parts in steps for part in parts])
        assert np.array_equal(np.sort(seen), np.repeat(np.arange(len(sft_lengths)), 2))
        return [sorted(part.example_ids.tolist()) for parts in steps for part in parts]

    packs = updates("page_packing:shuffled_fit")
    assert packs == updates("page_packing:shuffled_fit")
    assert packs != updates("page_packing:shuffled_fit", seed=1)
    assert len(packs) < 1.1 * 2 * sft_lengths.sum() / 4096  # they are packed

    def sets(name: str) -> list[set]:
        plan = make_plan(sft_lengths, strategy=name, max_tokens=4096, examples_per_step=64)
        return [set(np.concatenate([part.example_ids for part in plan.layout_of(s)])) for s in range(plan.total_steps)]

    assert updates("page_packing:dealt") and sets("page_packing:dealt") == sets("balanced")
    assert sets("page_packing:shuffled_fit") != sets("balanced")  # the control


SETTINGS = dict(
    use_cpu=True, per_device_train_batch_size=4, max_steps=3, logging_steps=1, learning_rate=1e-2, report_to="none",
    save_strategy="no", disable_tqdm=True,
)  # fmt: skip


def losses_of(code: str, scope: dict) -> list[float]:
    scope = scope | {"packtrain": packtrain}
    exec(code, scope)
    return [entry["loss"] for entry in scope["trainer"].state.log_history if "loss" in entry]


@pytest.mark.ci
@pytest.mark.slow
def test_the_preference_trainer_has_the_losses_it_had(folder):
    """Control: with the preferences the other way round they are others."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = train_bpe(["2+2? 4 3+3? 6 seven"] * 20, vocab_size=300)
    rows = [{"prompt": "2+2? " * (n % 5 + 1), "chosen": "4 " * (n % 3 + 1), "rejected": "seven"} for n in range(12)]
    code = example("README.md", "preferences")
    assert "packtrain.attach(trainer)" in code

    def losses(code: str, rows: list[dict]) -> list[float]:
        tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained("first")
        arguments = DPOConfig(output_dir="out", bf16=False, gradient_checkpointing=False, **SETTINGS)
        scope = {"DPOTrainer": DPOTrainer, "arguments": arguments, "model": "first", "tokenizer": tokenizer}
        return losses_of(code, scope | {"pairs": datasets.Dataset.from_list(rows)})

    before = losses(code.replace("packtrain.attach(trainer)", "trainer"), rows)
    np.testing.assert_allclose(losses(code, rows), before, rtol=1e-5)
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert np.abs(np.array(losses(code, turned)) - before).max() > 1e-4


@pytest.mark.ci
@pytest.mark.slow
def test_the_classifier_has_the_losses_it_had(folder):
    """Control: with other labels they are others."""
    tokenizer = train_bpe(["2+2? 4 3+3? 6"] * 20, vocab_size=300)
    texts = [{"input_ids": tokenizer("2+2? " * (n % 5 + 1))["input_ids"], "label": n % 2} for n in range(12)]
    code = example("README.md", "classifier")

    def losses(code: str, rows: list[dict]) -> list[float]:
        config = tiny_model("llama", vocab_size=len(tokenizer), pad_token_id=0).config
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        scope = {"Trainer": Trainer, "DataCollatorWithPadding": DataCollatorWithPadding, "tokenizer": tokenizer}
        scope |= {"model": model, "arguments": TrainingArguments("out", **SETTINGS)}
        return losses_of(code, scope | {"texts": datasets.Dataset.from_list(rows)})

    before = losses(code.replace("packtrain.attach(trainer)", "trainer"), texts)
    np.testing.assert_allclose(losses(code, texts), before, rtol=1e-5)
    assert np.abs(np.array(losses(code, [row | {"label": 0} for row in texts])) - before).max() > 1e-4


def test_the_unpadded_model_has_the_loss_it_had():
    """Its layers see no padding: hidden states are 0 there, which they are not before."""
    model = tiny_model("llama")
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss = model(**batch).loss
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    assert model.model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 4:].all()
    model.zero_grad()
    scope = {"packtrain": packtrain, "model": model, "batch": batch}
    exec(example("README.md", "unpad"), scope)
    assert scope["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    for weight, before in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, before, atol=1e-5, rtol=1e-4)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not hidden[0, 4:].any() and hidden[0, :4].all()


def test_the_template_with_tools_renders_all_that_another_drops(folder):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    turns = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "five, exactly"},
        {"role": "assistant", "content": "It is 5."},
    ]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n")
    (folder / "tools.jinja").write_text(example("recipes/README.md", "tools.jinja"))
    (folder / "plain.jinja").write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}")
    (folder / "recipe.yaml").write_text(RECIPE.replace("packtrain:arithmetic, num_rows: 40", "rows.jsonl"))
    settings = ["data.assistant_only_loss=true", "data.max_length=512"]
    task = load_task(packtrain.load_recipe("recipe.yaml", [*settings, "model.chat_template=tools.jinja"]))
    learnt = task.train[0]["labels"]
    text = task.tokenizer.decode(learnt[learnt != -100])
    assert '"add"' in text and '{"a": 2, "b": 3}' in text and "It is 5.<|end|>" in text
    assert "five, exactly" not in text and "2+3?" not in text
    with pytest.raises(DataError, match="set `model.chat_template` to a template that renders"):
        packtrain.load_examples(packtrain.load_recipe("recipe.yaml", [*settings, "model.chat_template=plain.jinja"]))


def test_the_refusal_of_deepspeeds_own_optimizer_is_as_the_page_shows_it(folder):
    section = {"type": "AdamW", "params": {"lr": 0.001}}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": section}))
    with pytest.raises(LaunchError) as error:
        deepspeed_config({"deepspeed": "ds.json"}, world_size=2, gradient_accumulation_steps=1, use_cpu=True, env={})
    assert str(error.value) == marked("launch/README.md", "message: deepspeed optimizer").rstrip()
