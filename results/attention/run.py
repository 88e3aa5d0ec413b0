"""Measures what the layout and the attention implementation cost: one training step in every layout.

    python results/attention/run.py                # all models, about five minutes each on two cores
    python results/attention/run.py --rounds 1 --models llama-6.6M-8k

The same documents (lengths drawn from the long-tailed lognormal of real fine-tuning data), the same model, the
same loss; only the layout changes. A step is forward, loss at the supervised positions and backward, over all
micro-batches. The ways are interleaved (A B C, A B C, ...), the median of each is reported in real tokens per
second relative to `pad_longest`, and the loss and gradient norm of every way are checked to be the same.
A second table times attention alone, forward and backward.

Writes `results/attention/bench.json` and `results/attention/README.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packtrain.modeling.attention.kernels import Documents, Pattern, attend
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.objectives.causal import causal_lm_losses
from packtrain.packing.collator import PackCollator
from packtrain.packing.plan import make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store

ROW = 2048  # tokens: the width of pad_max and of packed rows
LLAMA = dict(model_type="llama", vocab_size=4096, hidden_size=256, intermediate_size=640, num_hidden_layers=6)
LLAMA |= dict(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=ROW)
QWEN3 = dict(model_type="qwen3", vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6)
QWEN3 |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=ROW)
CASES: dict[str, tuple[dict, int, int]] = {  # config, documents, tokens
    "llama-6.6M-8k": (LLAMA, 48, 8_300),
    "llama-6.6M-12k": (LLAMA, 72, 12_700),
    "qwen3-16M-8k": (QWEN3, 48, 8_300),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to compute a step: a strategy of packtrain and an attention implementation.

    `rows` is the number of documents of a padded micro-batch; `max_tokens` the capacity of a flat one.
    """

    name: str
    strategy: str
    attention: str
    rows: int | None = None
    max_tokens: int | None = None


PADDED, BEST = "pad_longest", f"flat ~4k, {NAME}"
WAYS = [
    Way(name=f"pad_max ({ROW})", strategy="pad_max", attention="sdpa", rows=8),
    Way(name=PADDED, strategy="pad_longest", attention="sdpa", rows=8),
    Way(name="group_by_length", strategy="group_by_length", attention="sdpa", rows=8),
    Way(name=f"packed rows of {ROW}, sdpa block mask", strategy="bfd", attention="sdpa", max_tokens=ROW),
    Way(name="flat, all in one row, sdpa block mask", strategy="padding_free", attention="sdpa"),
    Way(name=f"flat, all in one row, {NAME}", strategy="padding_free", attention=NAME),
    Way(name=BEST, strategy="balanced", attention=NAME, max_tokens=4500),
]


def long_tailed_lengths(documents: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Draw lognormal lengths (sigma 1.15: the longest of 48 is some ten times the median), at most `ROW`, adding up to
    `tokens`; int64 `[documents]`."""
    draws = np.random.default_rng(seed).lognormal(0.0, 1.15, documents)
    lengths = np.clip(draws / draws.sum() * tokens, 8, ROW).astype(np.int64)
    lengths[np.argsort(lengths)[documents // 2]] += tokens - lengths.sum()  # rounding goes to the median document
    assert lengths.min() > 0 and lengths.sum() == tokens
    return lengths


def batches(way: Way, lengths: np.ndarray, vocabulary: int) -> list[dict]:
    """Lay out one step in which every document takes part once; the first third of each is prompt."""
    generator = np.random.default_rng(1)
    ids = [generator.integers(3, vocabulary, length) for length in lengths]
    labels = [np.where(np.arange(len(own)) < len(own) // 3, -100, own) for own in ids]
    micro_batches = -(-len(lengths) // way.rows) if way.rows else "auto"
    max_tokens = way.max_tokens or len(lengths) * ROW
    plan = make_plan(
        lengths,
        strategy=way.strategy,
        examples_per_step=len(lengths),
        max_tokens=max_tokens,
        max_length=ROW,
        gradient_accumulation_steps=micro_batches,
    )
    padded_to = {"pad_max": "max_length", "pad_longest": "longest", "group_by_length": "longest"}.get(way.strategy)
    collate = PackCollator(layout=plan.layout, padded_to=padded_to, max_length=ROW)
    made = [part for step in range(plan.total_steps) for part in plan.layout_of(step) if len(part)]
    assert sorted(i for part in made for i in part.example_ids) == list(range(len(lengths)))
    return [
        collate([{"input_ids": ids[i], "labels": labels[i], "example_id": i} for i in part.example_ids])
        for part in made
    ]


def step(model: PreTrainedModel, micro_batches: list[dict]) -> tuple[float, float, float]:
    """Compute one step, and return its seconds, loss and global gradient norm."""
    model.zero_grad()
    denominator = sum(batch["loss_weights"].sum() for batch in micro_batches)
    began, loss = time.perf_counter(), 0.0
    for batch in micro_batches:
        part = causal_lm_losses(model, batch).weighted_sum() / denominator
        part.backward()
        loss += part.item()
    seconds = time.perf_counter() - began
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    return seconds, loss, norm.item()


def bench_steps(case: str, rounds: int) -> dict:
    """Time all ways for one model and one set of documents, and check that they compute the same."""
    fields, documents, tokens = CASES[case]
    lengths = long_tailed_lengths(documents, tokens)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).train()
    laid_out = {way.name: batches(way, lengths, fields["vocab_size"]) for way in WAYS}
    seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    losses, norms = {}, {}
    for round in range(rounds + 1):  # the first is to warm up; pad_max, a minute a step, is timed once
        for way in WAYS:
            if way.strategy == "pad_max" and round != 1:
                continue
            model.set_attn_implementation(way.attention)
            elapsed, losses[way.name], norms[way.name] = step(model, laid_out[way.name])
            if round:
                seconds[way.name].append(elapsed)
        print(f"{case}: round {round} of {rounds} done", file=sys.stderr)
    for found in (losses, norms):
        reference = found[PADDED]
        worst = max(found, key=lambda name: abs(found[name] - reference))
        assert abs(found[worst] - reference) < 1e-4 * reference, f"{worst}: {found[worst]} is not {reference}"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "documents": {"count": documents, "tokens": tokens, "lengths": lengths.tolist()},
        "seconds": seconds,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "relative": {name: medians[PADDED] / median for name, median in medians.items()},
        "micro_batches": {name: len(parts) for name, parts in laid_out.items()},
        "computed_tokens": {
            name: sum(batch["input_ids"].numel() for batch in parts) for name, parts in laid_out.items()
        },
        "loss": losses,
        "gradient_norm": norms,
    }


# ---------------------------------------------------------------------------------------------- attention alone


def bench_attention(rounds: int, tokens: int = 8192, documents: int = 47, heads: int = 8, dim: int = 32) -> dict:
    """Time attention of one layer, forward and backward: per document, padded to the longest, and under a block mask."""
    lengths = long_tailed_lengths(documents, tokens).tolist()
    rows = Documents(bounds=(0, *accumulate(lengths)), device=torch.device("cpu"))
    owner = torch.arange(documents).repeat_interleave(torch.tensor(lengths))  # [T]
    inputs = [torch.randn(1, tokens, heads, dim).transpose(1, 2).requires_grad_() for _ in range(3)]

    def per_document(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, rows, Pattern(scaling=dim**-0.5))

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        each = (x[0].transpose(0, 1).split(lengths) for x in (query, key, value))
        query, key, value = (pad_sequence(parts, batch_first=True).transpose(1, 2) for parts in each)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        return torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])[None]

    def block_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = (owner[:, None] == owner) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    ways = {NAME: per_document, "padded to the longest": padded, "one row, block mask": block_mask}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for round in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            outputs[name] = way(*inputs)
            outputs[name].backward(torch.ones_like(outputs[name]))
            if round:
                seconds[name].append(time.perf_counter() - began)
    for output in outputs.values():
        torch.testing.assert_close(output, outputs[NAME], rtol=0, atol=1e-5)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slower = {name: median / medians[NAME] for name, median in medians.items()}
    return {"tokens": tokens, "lengths": lengths, "heads": heads, "dim": dim, "seconds": seconds, "slower": slower}


# ----------------------------------------------------------------------------------------------------- the report


def markdown(result: dict) -> str:
    """Write the page: both tables with their set-up."""
    steps, alone = result["steps"], result["attention_alone"]
    head = [
        f"{name} ({step['parameters'] / 1e6:.1f}M, {step['documents']['tokens']} tokens)"
        for name, step in steps.items()
    ]
    lines = [
        "# One training step in every layout",
        "",
        "What do padding, packed rows and flat rows cost, and what does the attention implementation cost?",
        "",
        "Real tokens per second relative to `pad_longest` (micro-batches of 8). Same documents, same loss and gradient",
        "norm (checked to 1e-4); forward, loss at the supervised positions and backward; medians of "
        f"{result['rounds']} interleaved rounds.",
        "",
        "| layout | " + " | ".join(head) + " |",
        "|---|" + "---|" * len(head),
    ]
    for way in WAYS:
        cells = (f"{step['relative'][way.name]:.2f}" for step in steps.values())
        bold = "**" if way.name == BEST else ""
        lines.append(f"| {bold}{way.name}{bold} | " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    rate = (f"{step['tokens_per_second'][PADDED]:,.0f}" for step in steps.values())
    lines += ["", "`pad_longest` itself computes " + ", ".join(rate) + " real tokens per second.", ""]
    lines += [
        f"Attention of one layer alone, forward and backward, {alone['tokens']} tokens in {len(alone['lengths'])}",
        f"documents of at most {max(alone['lengths'])}, {alone['heads']} heads of {alone['dim']}, in multiples of the",
        f"seconds of `{NAME}`:",
        "",
        "| " + " | ".join(alone["slower"]) + " |",
        "|" + "---|" * len(alone["slower"]),
        "| " + " | ".join(f"{value:.1f}" for value in alone["slower"].values()) + " |",
        *limits(
            "One training step, not a run; a CPU, where no flash-attention kernel is available and the block mask is "
            "at its most expensive; small models, in which attention is a larger share of the work than in large ones."
        ),
        *origin_lines(result, "torch", "transformers"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS / "attention", help="default results/attention")
    arguments = parser.parse_args()
    register()
    result = origin("attention") | {
        "load_before": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "ways": [asdict(way) for way in WAYS],
        "attention_alone": bench_attention(arguments.rounds),
        "steps": {case: bench_steps(case, arguments.rounds) for case in arguments.models},
    }
    store(arguments.out, result, page := markdown(result))
    print(page)


if __name__ == "__main__":
    main()
