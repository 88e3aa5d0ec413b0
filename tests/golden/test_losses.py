"""Twenty updates of tiny models from recipes: every loss and gradient norm, the held-out loss, and the counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from packtrain.cli import main
from tests.golden.store import exit_code, load, save

UPDATES = 20
DECODER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
CONFIGS = {
    "llama": dict(model_type="llama", **DECODER),
    "qwen3": dict(model_type="qwen3", **DECODER),
    "gemma2": dict(model_type="gemma2", **DECODER, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": dict(
        model_type="gpt2",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
OBJECTIVES = {
    "token": dict(name="causal_lm", loss_weighting="token"),
    "example": dict(name="causal_lm", loss_weighting="example"),
    "masked": dict(name="masked_diffusion", tail="rainbow", pad_count=3, canvas="multiple_of", canvas_size=16),
    "blocks": dict(name="block_diffusion", block_size=8),
}
STRATEGIES = ("pad_longest", "balanced", "bfd")
FULL = {
    f"{family}/{objective}/{strategy}/full": (family, objective, strategy, False)
    for family in CONFIGS
    for objective in OBJECTIVES
    for strategy in STRATEGIES
    if objective in ("token", "example") or family in ("llama", "qwen3")
    if not (objective == "blocks" and strategy == "pad_longest")  # refused: its attention takes flat batches only
}
LORA = {
    f"llama/{objective}/{strategy}/lora": ("llama", objective, strategy, True)
    for objective, strategy in (("token", "balanced"), ("example", "bfd"), ("masked", "pad_longest"), ("blocks", "bfd"))
}
CASES = FULL | LORA
COUNTS = ("updates", "micro_batches_per_update", "examples", "real_tokens", "supervised_tokens", "padding_share")
COUNTS += ("trainable_parameters", "frozen_parameters")


def recipe_of(family: str, objective: str, strategy: str, lora: bool) -> dict:
    causal = objective in ("token", "example")
    recipe = {
        "model": {"config": CONFIGS[family], "tokenizer_vocab_size": 300},
        "data": {
            "path": "packtrain:arithmetic",
            "num_rows": 72 if causal else 160,
            "max_length": 96,
            "overflow": "truncate" if causal else "drop",
            "on_bad_row": "skip",  # a prompt that fills it has nothing to learn
            "eval_size": 8,
        },
        "batching": {"strategy": strategy, "examples_per_step": 6, "max_tokens": 384},
        "objective": OBJECTIVES[objective],
        "training": {
            "output_dir": "out",
            "learning_rate": 1e-3,
            "max_steps": UPDATES,
            "logging_steps": 1,
            "save_steps": UPDATES,
            "report_to": "none",
            "use_cpu": True,
        },
    }
    return recipe | ({"lora": {"r": 4, "target_modules": "all-linear"}} if lora else {})


def trained(case: str, directory: Path) -> dict:
    """What a run of this case in `directory` has logged and summed up."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(*CASES[case])
    recipe["training"]["output_dir"] = str(directory / "out")
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert exit_code(main, ["train", str(path)]) == 0
    state = json.loads((directory / f"out/checkpoint-{UPDATES}/trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    keys = sorted({key for entry in logs for key in entry if key.startswith("loss") or key == "grad_norm"})
    curves = {key: [entry.get(key, 0.0) for entry in logs] for key in keys}  # 0 where an update has no such part
    summary = json.loads((directory / "out/summary.json").read_text())
    held_out = [summary["held_out_loss_before"], summary["held_out_loss_after"]]
    return {
        "curves": curves,
        "held_out": held_out,
        "counts": {key: summary[key] for key in COUNTS},
        "attn_implementation": summary["attn_implementation"],
    }


def store(directory: Path) -> None:
    save("losses", {case: trained(case, directory / case) for case in CASES})


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_stored(case, tmp_path):
    expected, found = load("losses")[case], trained(case, tmp_path)
    assert found["attn_implementation"] == expected["attn_implementation"]
    assert found["counts"] == pytest.approx(expected["counts"], rel=1e-9)
    assert found["curves"].keys() == expected["curves"].keys()
    assert len(found["curves"]["loss"]) == UPDATES
    for key, values in expected["curves"].items():
        assert found["curves"][key] == pytest.approx(values, rel=2e-4 if key == "grad_norm" else 2e-5), key
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=2e-5)


@pytest.mark.ci
@pytest.mark.slow
def test_nothing_stored_is_left_out():
    assert load("losses").keys() == CASES.keys()
