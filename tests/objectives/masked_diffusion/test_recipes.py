"""Recipes with the diffusion objectives, from YAML to a trained, sampled model."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from packtrain.cli import main
from packtrain.errors import ModelError, PacktrainError, PlanError, RecipeError
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.loading import load_config
from packtrain.objectives.masked_diffusion.answers import Trained, evaluate, sample
from packtrain.objectives.masked_diffusion.loss import make_bidirectional
from packtrain.objectives.task import load_task
from packtrain.packing.plan import Plan, make_plan, plan_evaluation, plan_run
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import ModelSection
from packtrain.training.run import build, train
from tests.tiny import tiny_model

QUIET = Console(quiet=True)
RECIPES = Path(__file__).parents[3] / "recipes"
RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, tie_word_embeddings: false}
  tokenizer_vocab_size: 300
data: {path: packtrain:arithmetic, num_rows: 60, max_length: 128, overflow: drop, eval_size: 8}
batching: {strategy: balanced, examples_per_step: 8, max_tokens: 2048}
objective: {name: masked_diffusion, tail: rainbow, pad_count: 3, canvas: multiple_of, canvas_size: 16}
training: {output_dir: OUT, learning_rate: 1e-3, max_steps: 12, logging_steps: 1, save_strategy: "no", report_to: none,
           use_cpu: true}
"""


@pytest.fixture
def recipe_path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
    return path


def planned(recipe: Recipe, lengths: np.ndarray) -> Plan:
    return plan_run(recipe.batching, recipe.schedule, lengths, max_length=recipe.data.max_length)


def plan_held_out(recipe: Recipe, lengths: np.ndarray, *, layout: str) -> Plan:
    equal_lengths = recipe.objective.equal_lengths
    return plan_evaluation(recipe.batching, lengths, layout=layout, world_size=2, equal_lengths=equal_lengths)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora={r: 4, target_modules: all-linear}", "batching.strategy=group_by_length", "objective.canvas=batch_max",
         "objective.canvas_size=null"],
        ["objective.tail=eos", "objective.norm=token", "objective.shift=true"],
        ["objective.tail=void"],
    ],
    ids=["lora, batch_max, padded", "full, eos, Dream's", "void"],
)  # fmt: skip
def test_train_sample_evaluate(recipe_path, overrides):
    recipe = load_recipe(recipe_path, overrides)
    summary = train(recipe, console=QUIET)
    assert summary.padding_share == 0 and summary.updates == 12
    assert len(sample(recipe, ["Mia has 3 coins.\n"], length=8)) == 1
    table = evaluate(recipe, lengths=[64], blocks=[1, 4], prompts=2, steps=8)
    assert table.count("\n") == 3 and (Path(summary.output_dir) / "evaluation/evaluation.json").exists()
    with pytest.raises(PacktrainError, match="holds out other examples than the run did"):
        evaluate(load_recipe(recipe_path, [*overrides, "data.eval_size=20"]), lengths=[64], prompts=2, steps=8)
    with pytest.raises(PacktrainError, match="different tokens"):
        sample(load_recipe(recipe_path, [*overrides, "data.num_rows=50"]), ["Mia has 3 coins.\n"], length=8)


def test_void_is_never_sampled_and_other_tails_are(recipe_path):
    for tail in ("void", "single"):
        task = load_task(load_recipe(recipe_path, [f"objective.tail={tail}"]))
        tokens, size = task.tokens, len(task.tokenizer)
        scores = torch.zeros(size)  # the tail is likeliest everywhere, then the end
        scores[[tokens.tail.eos_token_id, *tokens.tail.pad_token_ids]] = torch.tensor([50.0, 90.0])
        register()
        model = make_bidirectional(tiny_model("llama", vocab_size=size, attn_implementation=NAME))
        model.lm_head.register_forward_hook(lambda module, args, output, scores=scores: output + scores)
        trained = Trained(model=model, tokenizer=task.tokenizer, tokens=tokens, examples=task.train, shift=False)
        samples = trained.generate([[5, 6]], 4, trained.sampling(steps=4))
        assert samples.tokens[0, 0] == (tokens.tail.eos_token_id if tail == "void" else tokens.tail.pad_token_ids[0])
        assert trained.sampling().early_stop
        if tail == "void":
            with pytest.raises(PacktrainError, match="`void`, whose padding token is always banned"):
                trained.sampling(end_token_policy="suppress_logits")
        else:
            assert trained.sampling(end_token_policy="suppress_logits").end_token_policy == "suppress_logits"


def test_a_model_without_spare_rows_gets_some(recipe_path):
    """Its vocabulary is as large as its tokenizer's, until tails and masks add tokens."""
    recipe = load_recipe(recipe_path, ["objective={name: causal_lm}", "max_steps=1"])
    saved = train(recipe, console=QUIET).model_dir
    pretrained = ["model.config=null", "model.tokenizer_vocab_size=null", f"model.model_name_or_path={saved}"]
    recipe = load_recipe(recipe_path, pretrained)
    trainer, task = build(recipe), load_task(recipe)
    assert trainer.model.get_input_embeddings().weight.shape[0] == len(trainer.processing_class) == 300 + 3 + 1
    with pytest.raises(ModelError, match="the tokenizer has 304 tokens, the model only 300"):  # control: not every row
        load_config(ModelSection(model_name_or_path=saved), tokenizer=task.tokenizer, new_tokens=task.new_tokens[:-1])


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_said_what_became_of_new_tokens(recipe_path, lora):
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    more = ["lora={r: 4, target_modules: all-linear}"] if lora else []
    build(load_recipe(recipe_path, more), console=console)
    (said,) = (line for line in console.export_text().splitlines() if line.startswith("new tokens"))
    assert "4, " in said and ("train with the adapters" in said) == lora, "three pads and a mask"


def test_the_parts_of_the_loss_are_logged_and_evaluated(recipe_path):
    trainer = build(load_recipe(recipe_path, ["training.max_steps=1"]), console=QUIET)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"loss_content", "loss_eos", "loss_tail"} <= set(logged)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert {"eval_loss_content", "eval_loss_eos", "eval_loss_tail"} <= set(first)
    assert first["eval_loss"] == second["eval_loss"], "the noise of evaluation is always the same"


def test_every_epoch_has_its_own_noise(recipe_path):
    trainer = build(load_recipe(recipe_path, ["training.max_steps=14"]), console=QUIET)
    seen: list[dict[int, list[int]]] = []
    for epoch in range(2):
        loader = trainer.get_train_dataloader()
        start = epoch * trainer.plan.steps_in_epoch(0)
        loader.global_step = lambda start=start: start
        seen.append({})
        for batch in loader:
            bounds = pairwise(batch["cu_seq_lens_q"].tolist())
            for example, (start, stop) in zip(batch["example_ids"].tolist(), bounds, strict=True):
                seen[-1][example] = batch["input_ids"][0, start:stop].tolist()
    assert set(seen[0]) == set(seen[1])
    assert sum(seen[0][i] != seen[1][i] for i in seen[0]) > len(seen[0]) // 2


def test_block_diffusion_trains(recipe_path):
    summary = train(load_recipe(recipe_path, ["objective={name: block_diffusion, block_size: 8}"]), console=QUIET)
    assert summary.updates == 12 and summary.held_out_loss_after < summary.held_out_loss_before


CONVERSATION = [
    ("system", "short"),
    ("user", "two and two"),
    ("assistant", "four"),
    ("user", "more"),
    ("assistant", "8"),
]
MASKED = "objective={name: masked_diffusion, tail: eos, canvas: batch_max}"
BLOCKS = "objective={name: block_diffusion, block_size: 8}"


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    ("overrides", "learnt"),
    [
        ([MASKED], "8<|eos|>"),
        ([BLOCKS], "8<|eos|>"),
        ([MASKED, "data.completion_only_loss=true"], "8<|eos|>"),
        ([MASKED, "data.assistant_only_loss=true"], "four<|eos|>8<|eos|>"),
        (  # controls: what a causal model learns by default, and a diffusion model by request
            ["objective={name: causal_lm}"],
            "<|system|>short<|user|>two and two<|assistant|>four<|eos|><|user|>more<|assistant|>8<|eos|>",
        ),
        (
            [MASKED, "data.completion_only_loss=false"],
            "<|system|>short<|user|>two and two<|assistant|>four<|eos|><|user|>more<|assistant|>8<|eos|>",
        ),
    ],
)
def test_of_a_conversation_only_the_answer_is_canvas(recipe_path, tmp_path, format, overrides, learnt):
    column, role, content = {
        "messages": ("messages", "role", "content"),
        "sharegpt": ("conversations", "from", "value"),
    }[format]
    row = json.dumps({column: [{role: who, content: what} for who, what in CONVERSATION]})
    (tmp_path / "chats.jsonl").write_text(f"{row}\n{row}\n")
    data = f"data={{path: {tmp_path / 'chats.jsonl'}, max_length: 128, overflow: drop, eval_size: 1}}"
    task = load_task(load_recipe(recipe_path, [data, *overrides]))
    for examples in (task.train, task.held_out):
        own = getattr(examples, "examples", examples)[0]  # without the copies of block diffusion
        assert task.tokenizer.decode(own["input_ids"][own["labels"] != -100]) == learnt


@pytest.mark.parametrize("strategy", ["balanced", "padding_free", "bfd"])
def test_capacity_counts_the_views_of_block_diffusion(recipe_path, strategy):
    batching = f"batching={{strategy: {strategy}, examples_per_step: 8, max_tokens: 600}}"
    recipe = load_recipe(recipe_path, ["objective={name: block_diffusion, block_size: 8}", batching])
    task = load_task(recipe)
    plain, collator = task.train.examples, task.make_collator(layout="flat")

    def largest(lengths: np.ndarray) -> int:
        plan = planned(recipe, lengths)
        parts = [part for step in range(plan.steps_in_epoch(0)) for part in plan.micro_batches(step, 0)]
        rows = [[plain[i] | {"example_id": i} for i in part.example_ids.tolist()] for part in parts]
        return max(collator(own)["input_ids"].numel() for own in rows)

    assert largest(task.train.lengths) <= 600
    assert largest(plain.lengths) > 600, "control: planned by what was read"


def test_an_example_whose_views_exceed_the_capacity_is_refused(recipe_path):
    overrides = ["objective={name: block_diffusion, block_size: 8}", "batching.max_tokens=128"]
    with pytest.raises(PlanError, match="more than max_tokens = 128"):
        build(load_recipe(recipe_path, overrides), console=QUIET)


@pytest.mark.parametrize("strategy", ["balanced", "pad_longest", "group_by_length"])
def test_all_documents_of_an_update_become_as_long_as_its_longest(strategy):
    lengths = np.random.default_rng(0).integers(5, 60, size=103)
    plan = make_plan(lengths, strategy=strategy, examples_per_step=10, max_tokens=130, num_epochs=2, equal_lengths=True)
    for step in range(plan.total_steps):
        longest = lengths[plan.examples(step)].max()
        micro_batches = plan.micro_batches(step, 0)
        assert all((batch.lengths == longest).all() and batch.lengths.sum() <= 130 for batch in micro_batches)
        assert sorted(np.concatenate([b.example_ids for b in micro_batches])) == sorted(plan.examples(step))
    with pytest.raises(PlanError, match="longest document"):
        make_plan(lengths, strategy="bfd", max_tokens=130, equal_lengths=True)


LORA_RECIPE = RECIPES / "llada_8b_rainbow_lora.yaml"  # batch_max, 48 examples in an update, 8,192 tokens at once


def test_batch_max_fills_held_out_documents_as_those_of_training():
    """One long document lengthens those of its own update only."""
    lengths = np.array([60] * 299 + [2000])
    plan = plan_held_out(load_recipe(LORA_RECIPE), lengths, layout="padded")
    parts = [part for step in range(plan.total_steps) for rank in range(2) for part in plan.micro_batches(step, rank)]
    assert sorted(np.concatenate([part.example_ids for part in parts])) == list(range(300))
    assert sum(part.lengths.sum() for part in parts) == 48 * 2000 + 252 * 60
    sampled = load_recipe(RECIPES / "rainbow_cpu.yaml")  # control: where documents have their own lengths, all at once
    assert plan_held_out(sampled, lengths, layout="flat").total_steps == 1


def test_batch_max_evaluates_every_document_in_its_update(recipe_path):
    overrides = ["objective.canvas=batch_max", "objective.canvas_size=null", "batching.examples_per_step=3"]
    trainer = build(load_recipe(recipe_path, [*overrides, "data.eval_size=7"]), console=QUIET)
    plan, nll, widths = trainer.eval_plan, 0.0, set()
    for part in (part for step in range(3) for part in plan.micro_batches(step, 0)):
        for example_id, length in zip(part.example_ids, part.lengths, strict=True):
            one = np.array([example_id])
            ids, labels = trainer.eval_dataset.gather(one, stops=np.array([length]))
            batch = trainer.collator.collate(ids, labels, np.array([length]), one)
            nll += trainer.loss.losses(trainer.model.eval(), batch).weighted_sum().item()
            widths.add(int(length))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nll / 7, rel=1e-5)
    assert plan.total_steps == 3 and len(widths) > 1


@pytest.mark.parametrize(("given", "seed"), [([], 7), (["training.data_seed=0"], 0), (["training.data_seed=3"], 3)])
def test_the_seed_of_the_data_may_be_zero(recipe_path, given, seed):
    recipe = load_recipe(recipe_path, ["training.seed=7", *given])
    assert planned(recipe, np.full(60, 9)).scope.seed == seed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.canvas=null", "objective.canvas_size=null"], "does not go with the tail"),
        (["objective.canvas=batch_max"], "canvas_size"),
        (["data.overflow=truncate"], "cuts answers"),
        (["objective.name=causal_lm"], "is a key of .*`masked_diffusion`.*, not of `causal_lm`"),
        (["objective.block_size=8"], "is a key of `block_diffusion`, not of `masked_diffusion`"),
        (["batching.strategy=wrapped"], "`masked_diffusion` needs whole ones"),
        (["objective={name: block_diffusion}", "batching.strategy=wrapped"], "`block_diffusion` needs whole ones"),
    ],
)
def test_contradictions(recipe_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_path, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--lengths", "64,x"], "must be a list of positive integers"),
        (["evaluate", "--lengths", "64"], "there is no model yet"),
        (["sample", "--prompt", "1 + 1"], "there is no model yet"),
    ],
)
def test_what_the_verbs_refuse(recipe_path, capsys, arguments, message):
    verb, *options = arguments
    with pytest.raises(SystemExit) as end:
        main([verb, str(recipe_path), *options])
    assert end.value.code == 2 and message in capsys.readouterr().err
