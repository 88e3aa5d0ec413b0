"""Measures static shapes: padding of up to 16 shapes, graphs, and seconds of an update with and without a compiler.

    python results/shapes/run.py                       # about eight minutes on two cores
    python results/shapes/run.py --rounds 1 --updates 2 --layers 1 --examples 1000

Padding is that of whole plans, for two kinds of lengths and three strategies. Ways to run the same updates of the same
model are interleaved (A B C, A B C, ...): as it is, compiled by inductor with one graph for any number of tokens, and
compiled with a graph for each of the plan's shapes. Every way computes every update once before the clock counts, which
is when graphs are made; those seconds are a column of their own. The losses of all ways must agree to 1e-4, and there may
be no more graphs than shapes, or the benchmark stops. Finished parts are kept in `out/`: a run that was stopped goes on
behind them.

Writes `results/shapes/bench.json` and `results/shapes/README.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

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
from results.page import RESULTS, Kept, limits, origin, origin_lines, store

VOCABULARY = 4096
MODEL = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=640, num_attention_heads=8)
COUNTS, SHAPES = (1, 2, 4, 8, 16), 4  # of padding; of the compiled model
EAGER, ONE, SHAPED = "not compiled", "compiled, any number of tokens", "compiled, static shapes"


def sft_like(count: int) -> np.ndarray:
    """Lengths of instructions and answers: a median of 400 tokens, at most 4,096."""
    return np.random.default_rng(0).lognormal(6.0, 0.8, count).clip(20, 4096).astype(np.int64)


def long_tailed(count: int) -> np.ndarray:
    """A median of 150 tokens and one of a hundred beyond 4,900, at most 8,192."""
    return np.random.default_rng(1).lognormal(5.0, 1.5, count).clip(5, 8192).astype(np.int64)


LENGTHS = {"SFT-like": sft_like, "long-tailed": long_tailed}
STRATEGIES = ("balanced", "padding_free", "bfd")


def padding_of(kind: str, strategy: str, examples: int) -> dict[str, float]:
    """Padding share by the number of shapes."""
    settings = dict(strategy=strategy, max_tokens=16_384, examples_per_step=128, world_size=2)
    plans = {count: make_plan(LENGTHS[kind](examples), shapes=count, **settings) for count in COUNTS}
    print(f"{kind}, {strategy}", file=sys.stderr)
    return {str(count): plan.shapes.padding_share for count, plan in plans.items() if plan.shapes is not None}


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

    def extras(self, ids: np.ndarray) -> dict:
        """Adds nothing to a batch."""
        return {}


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


class Ways:
    """The three ways, ready to compute; graphs are made when one first computes the updates.

    Attributes:
        plans, models, batches: of each way; the batches of every update.
    """

    def __init__(self, updates: int, layers: int, backend: str):
        rows = Rows(sft_like(8 * updates))
        settings = dict(max_tokens=4096, examples_per_step=8, max_steps=updates)
        plain, shaped = make_plan(rows.lengths, **settings), make_plan(rows.lengths, shapes=SHAPES, **settings)
        self.plans = {EAGER: plain, ONE: plain, SHAPED: shaped}
        self.models = {way: model_of(way, layers, backend) for way in self.plans}
        self.batches = {way: [batches_of(plan, rows, at) for at in range(updates)] for way, plan in self.plans.items()}
        settings_of_torch: Any = torch._dynamo.config
        settings_of_torch.recompile_limit = 64

    def warm_up(self) -> dict[str, dict[str, Any]]:
        """Computes every update once in every way; returns seconds, losses and graphs, once they are as they must be."""
        found: dict[str, dict[str, Any]] = {}
        for way, plan in self.plans.items():
            before = counters["stats"]["unique_graphs"]
            pairs = [update(self.models[way], batches) for batches in self.batches[way]]
            losses, graphs = [loss for _, loss in pairs], counters["stats"]["unique_graphs"] - before
            padding = 0.0 if plan.shapes is None else plan.shapes.padding_share
            found[way] = {"first": sum(seconds for seconds, _ in pairs), "losses": losses, "graphs": graphs}
            found[way] |= {"padding": padding, "most": {EAGER: 0, ONE: 2}.get(way, SHAPES)}
            print(f"{way}: warmed up in {found[way]['first']:.0f} s, {graphs} graphs", file=sys.stderr)
            worst = max(abs(one / other - 1) for one, other in zip(losses, found[EAGER]["losses"], strict=True))
            assert worst < 1e-4, f"{way}: losses differ by {worst:.1e}"
            assert graphs <= found[way]["most"], f"{way}: {graphs} graphs"
        return found

    def one_round(self) -> dict[str, list[float]]:
        """Seconds of every update, the ways in turns."""
        seconds: dict[str, list[float]] = {way: [] for way in self.plans}
        for step in range(len(self.batches[EAGER])):
            for way in self.plans:
                seconds[way].append(update(self.models[way], self.batches[way][step])[0])
        return seconds


def model_of(way: str, layers: int, backend: str) -> PreTrainedModel:
    """The model of one way; all have the same weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL, num_hidden_layers=layers, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
    if way != EAGER:
        for layer in layers_of(model):
            layer.compile(backend=backend, dynamic=way == ONE)
    return model


def bench_speed(kept: Kept, rounds: int, updates: int, layers: int, backend: str) -> dict[str, dict[str, Any]]:
    """Times all ways; medians over rounds and updates, and relative to the first by the median of paired ratios."""
    ways = Ways(updates, layers, backend)
    warm = ways.warm_up()
    first = kept.measure("first pass", lambda: warm)
    each = [kept.measure(f"round {number}", ways.one_round) for number in range(rounds)]
    seconds = {way: [one for turn in each for one in turn[way]] for way in first}
    ratios = {way: [one / other for one, other in zip(seconds[way], seconds[EAGER], strict=True)] for way in first}
    return {
        way: first[way] | {"seconds": statistics.median(seconds[way]), "ratio": statistics.median(ratios[way])}
        for way in first
    }


def markdown(result: dict) -> str:
    lines = [
        "# Static shapes",
        "",
        "What do a few static shapes cost in padding, and does a compiled model gain by them?",
    ]
    lines += [
        "",
        "Padding of micro-batches that are rounded up to one of N numbers of tokens (16,384 at most, two ranks,",
    ]
    lines += ["128 examples an update), by the number of shapes:", ""]
    lines += ["| lengths, strategy | " + " | ".join(map(str, COUNTS)) + " |", "|---|" + "---:|" * len(COUNTS)]
    for name, row in result["padding"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[str(count)]:.1%}" for count in COUNTS) + " |")
    lines += [
        "",
        f"An update of a Llama of {result['layers']} layers (hidden 256) on the CPU, forward and backward:",
        "",
    ]
    lines += ["| way | seconds | relative | padding | graphs | at most | seconds of the first pass |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for way, row in result["speed"].items():
        figures = f"{row['seconds']:.2f} | {row['ratio']:.2f} | {row['padding']:.1%} | {row['graphs']} | {row['most']}"
        lines.append(f"| {way} | {figures} | {row['first']:.0f} |")
    text = "A GPU, where launches cost more and inductor gains more. In a graph, attention is computed anew in the backward"
    lines += limits(text + " pass on the CPU; varlen kernels on CUDA keep what they need.")
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of timed updates (default 3)")
    parser.add_argument("--updates", type=int, default=6, help="of a round (default 6)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    parser.add_argument(
        "--examples", type=int, default=10_000, help="of the plans whose padding counts (default 10,000)"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--out", type=Path, default=RESULTS / "shapes", help="default results/shapes")
    args = parser.parse_args()
    register()
    kept, cases = Kept("shapes"), [(kind, strategy) for kind in LENGTHS for strategy in STRATEGIES]
    result = origin("shapes") | {"layers": args.layers, "rounds": args.rounds}
    result["padding"] = {
        f"{kind}, {strategy}": kept.measure(f"{kind}, {strategy}", partial(padding_of, kind, strategy, args.examples))
        for kind, strategy in cases
    }
    result["speed"] = bench_speed(kept, args.rounds, args.updates, args.layers, args.backend)
    store(args.out, result, markdown(result))
    kept.finish()
    print(markdown(result))


if __name__ == "__main__":
    main()
