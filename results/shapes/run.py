"""Measures static shapes: padding of up to 16 shapes, graphs, and seconds of an update with and without a compiler.

    python results/shapes/run.py                       # about fifteen minutes on two cores
    python results/shapes/run.py --rounds 1 --updates 2 --layers 2

Ways to run the same updates of the same model, interleaved (A B C, A B C, ...): as it is, compiled by inductor with one
graph for any number of tokens, and compiled with a graph for each of the plan's shapes. Every way computes every update
once before the clock counts, which is when graphs are made; those seconds are a column of their own. The losses of all ways
are checked to be the same.

Writes `results/shapes/bench.json` and `results/shapes/README.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packtrain.modeling.attention.varlen import NAME, register
from packtrain.objectives.causal import causal_lm_losses
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import Plan, make_plan
from packtrain.training.compiling import layers_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store

VOCABULARY = 4096
MODEL = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=640, num_attention_heads=8)
COUNTS = (1, 2, 4, 8, 16)
EAGER, ONE, SHAPED = "not compiled", "compiled, any number of tokens", "compiled, static shapes"


def sft_like(count: int) -> np.ndarray:
    """Lengths of instructions and answers: a median of 400 tokens, at most 4,096."""
    return np.random.default_rng(0).lognormal(6.0, 0.8, count).clip(20, 4096).astype(np.int64)


def long_tailed(count: int) -> np.ndarray:
    """A median of 150 tokens and one of a hundred beyond 4,900, at most 8,192."""
    return np.random.default_rng(1).lognormal(5.0, 1.5, count).clip(5, 8192).astype(np.int64)


LENGTHS = {"SFT-like": sft_like, "long-tailed": long_tailed}


def bench_padding(examples: int) -> dict[str, dict[str, float]]:
    """Padding share of each number of shapes, for two kinds of lengths and three strategies."""
    found: dict[str, dict[str, float]] = {}
    for kind, draw in LENGTHS.items():
        for strategy in ("balanced", "padding_free", "bfd"):
            settings = dict(strategy=strategy, max_tokens=16_384, examples_per_step=128, world_size=2)
            row = found[f"{kind}, {strategy}"] = {}
            for count in COUNTS:
                shapes = make_plan(draw(examples), shapes=count, **settings).shapes
                assert shapes is not None
                row[str(count)] = shapes.padding_share
    return found


class Rows:
    """Random examples of these lengths, as `MicroBatches` wants them; the first third of each is prompt."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths
        self.supervised = lengths - np.maximum(lengths // 3, 1)

    def gather(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns input ids and labels of examples, end to end."""
        rows = [np.random.default_rng(int(number)).integers(3, VOCABULARY, self.lengths[number]) for number in ids]
        labels = [np.where(np.arange(len(row)) < max(len(row) // 3, 1), -100, row) for row in rows]
        return np.concatenate(rows), np.concatenate(labels)

    def factors(self, *given) -> None:
        """Weighs no token."""


def update(model: PreTrainedModel, batches: list[dict]) -> tuple[float, float]:
    """Computes forward and backward of an update, and returns its seconds and loss."""
    model.zero_grad()
    denominator = sum(batch["loss_weights"].sum() for batch in batches)
    began, loss = time.perf_counter(), 0.0
    for batch in batches:
        part = causal_lm_losses(model, batch).weighted_sum() / denominator
        part.backward()
        loss += part.item()
    return time.perf_counter() - began, loss


def batches_of(plan: Plan, rows: Rows, step: int) -> list[dict]:
    micro_batches = MicroBatches(rows, PackCollator(), plan.shapes)  # type: ignore[arg-type]
    return [micro_batches[part] for part in plan.layout_of(step)]


def bench_speed(rounds: int, updates: int, layers: int, backend: str) -> dict[str, dict[str, float]]:
    """Times all ways; medians over rounds and updates, and relative to the first by the median of paired ratios."""
    rows = Rows(sft_like(64 * updates))
    settings = dict(max_tokens=4096, examples_per_step=8, max_steps=updates)
    plain, shaped = make_plan(rows.lengths, **settings), make_plan(rows.lengths, shapes=4, **settings)
    plans = {EAGER: plain, ONE: plain, SHAPED: shaped}
    models = {}
    for way in plans:
        torch.manual_seed(0)
        config = AutoConfig.for_model(**MODEL, num_hidden_layers=layers, max_position_embeddings=4096)
        models[way] = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
        if way != EAGER:
            for layer in layers_of(models[way]):
                layer.compile(backend=backend, dynamic=way == ONE)
    laid_out = {way: [batches_of(plan, rows, step) for step in range(updates)] for way, plan in plans.items()}
    losses, first, graphs = {}, {}, {}
    settings_of_torch = torch._dynamo.config
    settings_of_torch.recompile_limit = 64  # type: ignore[assignment]
    for way in plans:
        before = counters["stats"]["unique_graphs"]
        found = [update(models[way], batches) for batches in laid_out[way]]
        first[way], losses[way] = sum(seconds for seconds, _ in found), [loss for _, loss in found]
        graphs[way] = counters["stats"]["unique_graphs"] - before
        print(f"{way}: warmed up in {first[way]:.0f} s", file=sys.stderr)
        worst = max(abs(mine - theirs) / theirs for mine, theirs in zip(losses[way], losses[EAGER], strict=True))
        assert worst < 1e-4, f"{way}: losses differ by {worst:.1e}"
    seconds: dict[str, list[float]] = {way: [] for way in plans}
    for number in range(rounds):
        for step in range(updates):
            for way in plans:
                seconds[way].append(update(models[way], laid_out[way][step])[0])
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return {
        way: {
            "seconds": statistics.median(seconds[way]),
            "ratio": statistics.median(
                mine / theirs for mine, theirs in zip(seconds[way], seconds[EAGER], strict=True)
            ),
            "first": first[way],
            "graphs": graphs[way],
            "padding": plan.shapes.padding_share if plan.shapes is not None else 0.0,
        }
        for way, plan in plans.items()
    }


def page(result: dict) -> str:
    lines = ["# Static shapes", ""]
    lines += [
        "Padding of micro-batches that are rounded up to one of N numbers of tokens (16,384 at most, two ranks, 128"
    ]
    lines += ["examples an update), by the number of shapes:", ""]
    lines += ["| lengths, strategy | " + " | ".join(map(str, COUNTS)) + " |", "|---" * (len(COUNTS) + 1) + "|"]
    for name, row in result["padding"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[str(count)]:.1%}" for count in COUNTS) + " |")
    lines += [
        "",
        f"An update of a Llama of {result['layers']} layers (hidden 256) on the CPU, forward and backward:",
        "",
    ]
    lines += [
        "| way | seconds | relative | padding | graphs | seconds of the first pass |",
        "|---|---|---|---|---|---|",
    ]
    for way, row in result["speed"].items():
        figures = f"{row['seconds']:.2f} | {row['ratio']:.2f} | {row['padding']:.1%} | {row['graphs']:.0f}"
        lines.append(f"| {way} | {figures} | {row['first']:.0f} |")
    text = "A GPU, where launches cost more and inductor gains more. In a graph, attention is computed anew in the backward"
    lines += limits(text + " pass on the CPU; varlen kernels on CUDA keep what they need.")
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, default=RESULTS / "shapes")
    args = parser.parse_args()
    register()
    result = origin("shapes") | {"layers": args.layers, "padding": bench_padding(args.examples)}
    result["speed"] = bench_speed(args.rounds, args.updates, args.layers, args.backend)
    store(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
