"""Trains hybrid and state-space models flat outside and padded inside, against plain padding: the same, and faster?

    python results/mixers/run.py                  # about ten minutes on two quiet cores
    python results/mixers/run.py --rounds 1 --updates 2
    python results/mixers/run.py --only equality  # or speed; the other part stays as it is stored

- speed: every model trains the same updates with `pad_longest` and with `balanced`, in interleaved rounds, on examples
  whose lengths have a long tail. Their losses must agree.
- equality: tiny models of many architectures train 20 updates in both ways and by a literal loop over single documents.

Writes `results/mixers/bench.json` and `results/mixers/README.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

from packtrain.compare.statistics import Ratio, largest_relative_difference, paired_ratio
from packtrain.data.examples import Examples
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.isolation import check_isolation
from packtrain.packing.collator import PackCollator
from packtrain.packing.plan import make_plan
from packtrain.training.trainer import PackTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.mixers import equality
from results.page import RESULTS, command_line, limits, origin, origin_lines, store

VOCABULARY, LONGEST, EXAMPLES = 2048, 1024, 16  # the last per update
WAYS = ("pad_longest", "balanced")
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 256, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-Next": {
        **{"model_type": "qwen3_next", "num_hidden_layers": 4, "intermediate_size": 512, "head_dim": 64},
        **{"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4},
        **{"num_experts_per_tok": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64, **HEADS},
    },
    "Falcon-H1": {
        **{"model_type": "falcon_h1", "num_hidden_layers": 4, "intermediate_size": 768, "head_dim": 64, **HEADS},
        **{"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1},
        **{"mamba_chunk_size": 64},
    },
    "Mamba-2": {
        **{"model_type": "mamba2", "num_hidden_layers": 6, "num_heads": 8, "head_dim": 64, "state_size": 64},
        **{"n_groups": 1, "chunk_size": 64},
    },
}


def lengths_of(count: int) -> np.ndarray:
    """Draws lengths with a long tail: lognormal, median 90, at most 1,024 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, count), 8, LONGEST).astype(int)


def examples_of(count: int) -> Examples:
    generator = np.random.default_rng(1)
    rows = [generator.integers(3, VOCABULARY, length).tolist() for length in lengths_of(count)]
    return Examples.from_dataset(datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]))


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def train(name: str, strategy: str, updates: int, max_tokens: int) -> dict[str, Any]:
    """Trains `updates` and returns their losses, and seconds and real tokens of all but the first."""
    examples = examples_of(EXAMPLES * updates)
    plan = make_plan(
        examples.lengths,
        strategy=strategy,
        seed=0,
        examples_per_step=EXAMPLES,
        max_tokens=max_tokens,
        max_length=LONGEST,
        num_epochs=1.0,
        max_steps=updates,
        world_size=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON | MODELS[name]))
    said = ""
    if plan.layout == "flat":
        model.set_attn_implementation(register())
        assert model.config._attn_implementation == NAME
        said = check_isolation(model, "flat", torch.device("cpu")).says
        assert said.startswith("isolated"), said
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            use_cpu=True,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            per_device_train_batch_size=1,
            max_steps=updates,
            ignore_data_skip=True,
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
        )
        collator = PackCollator(layout=plan.layout, pad_token_id=0, padded_to=None)
        trainer, clock = PackTrainer(model, args, train_examples=examples, plan=plan, collator=collator), Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    timed = [int(number) for step in range(1, updates) for number in plan.examples(step)]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.ends[-1] - clock.ends[0],
        "tokens": int(examples.lengths[timed].sum()),
        "weights": sum(weight.numel() for weight in model.parameters()),
        "says": said.partition("; ")[2],
    }


def compare(name: str, rounds: int, updates: int, max_tokens: int) -> dict[str, Any]:
    """Trains both ways in turns; every other round begins with the other."""
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS[:: -1 if number % 2 else 1]:
            found[way].append(train(name, way, updates, max_tokens))
            print(f"{name}, {way}: {found[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    difference = largest_relative_difference(found["balanced"][0]["losses"], found["pad_longest"][0]["losses"])
    assert difference < 1e-4, f"the losses differ by {difference}"
    seconds = {way: [one["seconds"] for one in those] for way, those in found.items()}
    tokens = found["balanced"][0]["tokens"]
    return {
        "model": name,
        "weights": found["balanced"][0]["weights"],
        "padded_inside": found["balanced"][0]["says"],
        "tokens_per_second": {way: tokens / float(np.median(those)) for way, those in seconds.items()},
        "seconds": seconds,
        "faster": asdict(paired_ratio(seconds["pad_longest"], seconds["balanced"])),
        "largest_relative_loss_difference": difference,
    }


def padding(updates: int) -> float:
    """Returns the share of padding of whole updates padded to their longest example."""
    lengths = lengths_of(EXAMPLES * updates).reshape(updates, EXAMPLES)
    return 1 - lengths.sum() / (lengths.max(axis=1) * EXAMPLES).sum()


def markdown(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Hybrid and state-space models, flat outside and padded inside",
            "",
            "Do models whose recurrent layers know no documents train flat as they train padded, where these layers alone",
            "are given padded documents in groups of like length, and how much faster?",
            *(equality.lines(result["equality"], result["equality_command"]) if "equality" in result else []),
            *(speed_lines(result) if "models" in result else []),
            *limits(
                "Small models with random weights on a CPU in float32, with the reference implementations of their layers: "
                "on a GPU the kernels of flash-linear-attention and mamba-ssm may take documents themselves, and then "
                "nothing is padded. A tiny DeepSeek V3.2, whose sparse attention chooses keys one by one, differs from the "
                "loop padded as well as flat, and is left out."
            ),
            *origin_lines(result, "torch", "transformers"),
        ]
    )


def speed_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Faster",
        "",
        f"{EXAMPLES} examples per update, of lengths with a long tail (lognormal, median 90, at most {LONGEST:,} tokens),",
        f"at most {result['max_tokens']:,} tokens per micro-batch. Padded to the longest of its update, "
        f"{result['padding']:.0%} of a batch would be padding.",
        "",
        "| model | weights | padded inside | pad_longest | balanced | faster | losses differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["models"]:
        rates = one["tokens_per_second"]
        cells = [one["model"], f"{one['weights'] / 1e6:.1f} M", one["padded_inside"].removeprefix("padded inside: ")]
        cells += [f"{rates[way]:,.0f} tokens/s" for way in WAYS]
        cells += [f"**{Ratio(**one['faster']).text()}**", f"{one['largest_relative_loss_difference']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "*tokens/s* counts real tokens of whole updates: loading, forward, backward, optimizer. *faster*: the ratio of",
        f"times within a round, over {result['rounds']} interleaved rounds.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help=f"to time; default: {', '.join(MODELS)}")
    parser.add_argument("--only", choices=("speed", "equality"), help="one part (default: both)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=4096, help="most tokens of a micro-batch (default 4096)")
    parser.add_argument("--out", type=Path, default=RESULTS / "mixers")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    stored = arguments.out / "bench.json"
    result = origin("mixers") | (json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {})
    if arguments.only != "speed":
        result |= {"equality": [], "equality_command": command_line("mixers")}
        for family in equality.FAMILIES:
            result["equality"].append(asdict(equality.examine(family)))
            print(result["equality"][-1], file=sys.stderr, flush=True)
            store(arguments.out, result, markdown(result), depth=1)
    if arguments.only != "equality":
        result |= origin("mixers") | {
            "rounds": arguments.rounds,
            "max_tokens": arguments.max_tokens,
            "padding": padding(arguments.updates),
            "models": [],
        }
        for name in arguments.models or MODELS:
            result["models"].append(compare(name, arguments.rounds, arguments.updates, arguments.max_tokens))
            store(arguments.out, result, markdown(result), depth=1)
    store(arguments.out, result, markdown(result), depth=1)


if __name__ == "__main__":
    main()
