"""Models that mix tokens by more than attention train flat as they train padded, and as on single documents."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PrinterCallback

from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.settings import switchable
from packtrain.modeling.isolation import check_isolation
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, fit
from tests.training.helpers import Curve, LeakingCollator, curve, make_trainer

LONG = (pytest.mark.slow, pytest.mark.ci)
SHORT = ("lfm2_moe", "gptj")
FAMILIES = (
    *("bamba", "bloom", "falcon", "falcon_h1", "gpt_neox", "gpt_neox_japanese", "gptj", "granitemoehybrid", "jamba"),
    *("lfm2_moe", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next"),
    *("recurrent_gemma", "rwkv", "xlstm", "bart", "codegen"),
)
CASES = [pytest.param(family, marks=() if family in SHORT else LONG) for family in FAMILIES]
BY_POSITIONS = ("gptj", "codegen", "gpt_neox_japanese")  # their masks tell documents by positions that restart
DELTA_RULES = ("olmo_hybrid", "qwen3_5_text", "qwen3_next")
UPDATES, RATE = 20, 0.02
SETTINGS = {
    **{"examples_per_step": 3, "max_steps": UPDATES, "max_tokens": 160},
    **{"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"},
}


def model_of(family: str) -> torch.nn.Module:
    """Makes the model. Delta rules with large random weights multiply rounding, padded as well as flat: theirs are small."""
    model = tiny_model(family, vocab_size=64)
    if family in DELTA_RULES:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(0.3)
    return model


def train(tmp_path, family: str, strategy: str, **settings) -> Curve:
    """Trains 20 updates as a recipe does, after the check of its documents."""
    trainer = make_trainer(tmp_path, strategy=strategy, model=model_of(family), **SETTINGS | settings)
    trainer.remove_callback(PrinterCallback)
    if trainer.plan.layout == "flat":
        if switchable(trainer.model, NAME):
            trainer.model.set_attn_implementation(NAME)
        found = check_isolation(trainer.model, "flat", torch.device("cpu"))
        assert found.says.startswith("isolated")
    return curve(trainer)


def one_by_one(tmp_path, family: str) -> Curve:
    """Trains the same updates by a literal loop over single documents."""
    trainer = make_trainer(tmp_path, strategy="pad_longest", model=model_of(family), **SETTINGS)
    model, plan, examples = trainer.model.train(), trainer.plan, trainer.train_dataset
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    for step in range(UPDATES):
        documents = [examples[int(number)] for number in plan.examples(step)]
        supervised = sum((one["labels"][1:] >= 0).sum() for one in documents)
        optimizer.zero_grad()
        total = 0.0
        for one in documents:
            ids, labels = (torch.as_tensor(one[name]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return Curve(loss=np.array(losses), grad_norm=np.array(norms))


@pytest.mark.parametrize("family", CASES)
def test_flat_padded_and_one_by_one_are_the_same_updates(tmp_path, family):
    alone = one_by_one(tmp_path, family)
    assert len(alone.loss) == UPDATES and np.ptp(alone.loss) > 1e-3
    for strategy in ("pad_longest", "balanced"):
        assert train(tmp_path, family, strategy).difference(alone) < 1e-5, strategy
    if family not in BY_POSITIONS:  # control: documents that are said to be one
        leaking = LeakingCollator(layout="flat", pad_token_id=0)
        assert train(tmp_path, family, "balanced", collator=leaking).difference(alone) > 1e-3


RECIPES = {
    "gptj": ("{model_type: gptj, n_embd: 32, n_layer: 2, n_head: 4, rotary_dim: 8}", "2 mixers (GPTJAttention)"),
    "falcon": (
        "{model_type: falcon, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4}",
        "2 mixers (FalconAttention)",
    ),
    "lfm2": (
        "{model_type: lfm2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
        "intermediate_size: 48, layer_types: [conv, full_attention]}",
        "1 mixer (Lfm2ShortConv)",
    ),
    "gpt_neox": (
        "{model_type: gpt_neox, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}",
        None,
    ),
}


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_with_a_flat_strategy_trains(tmp_path, family):
    config, inside = RECIPES[family]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model: {{config: {config}, tokenizer_vocab_size: 320}}
data: {{path: "packtrain:arithmetic", num_rows: 16, max_length: 256, overflow: drop}}
batching: {{strategy: balanced, examples_per_step: 4, max_tokens: 512}}
training: {{output_dir: {tmp_path / "run"}, max_steps: 2, report_to: none, save_strategy: "no", use_cpu: true}}
""")
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    trainer = build(load_recipe(path), console=console)
    said = next(line for line in console.export_text().splitlines() if line.startswith("documents of a flat batch"))
    assert "isolated" in said
    assert said.endswith(f"padded inside: {inside}") if inside else "padded inside" not in said
    fit(trainer)
    assert trainer.state.global_step == 2
