"""Measures a padding-free encoder against a padded one: what ByteTransformer does in its own kernels, in transformers.

    python results/encoder/run.py            # BERT-base, about four minutes on two cores

Batches of 16 texts with lengths uniform in [0.2, 1] x the longest (60% of the padded tokens are real), the longest
128, 256 and 512 tokens, random weights in float32. Padded with sdpa attention against one flat row with
`packtrain_varlen`, forward (no gradients) and a training step (forward, cross-entropy at 15% of the tokens,
backward), interleaved, for `--seconds` per length and at least two rounds. Outputs of real tokens must be equal to
1e-5 and gradients to 1e-4, or the benchmark stops.

ByteTransformer: Zhai et al., https://arxiv.org/abs/2210.03052. The limit is 1 / 0.6 = 1.67 for the linear layers, and
more for attention, whose cost grows with the square of the length.

Writes `results/encoder/bench.json` and `results/encoder/README.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, BertConfig, PreTrainedModel

from packtrain.modeling.attention.varlen import NAME, register
from packtrain.packing.collator import PackCollator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store

TEXTS, LONGEST = 16, (128, 256, 512)
WAYS = {"padded, sdpa": ("padded", "sdpa"), f"flat, {NAME}": ("flat", NAME)}
LABELS = ("labels", "loss_weights", "example_ids")


def texts(longest: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Draw random tokens; one text is as long as allowed and one as short."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(longest // 5, longest + 1, TEXTS)
    lengths[:2] = longest, longest // 5
    return [{"input_ids": generator.integers(1000, 30_000, length)} for length in lengths]


def real_tokens(hidden: Tensor, batch: dict) -> Tensor:
    """Select `[real tokens, D]` of `[B, T, D]`, in the order of the texts in both layouts."""
    return hidden[batch["attention_mask"].bool()] if "attention_mask" in batch else hidden[0]


def forward(model: PreTrainedModel, batch: dict) -> Tensor:
    return real_tokens(model(**batch).last_hidden_state, batch)


def training_step(model: PreTrainedModel, batch: dict, tokens: Tensor) -> Tensor:
    """Compute the gradients of the cross-entropy of every seventh token, through the word embeddings."""
    model.zero_grad()
    predicted = forward(model, batch)[::7] @ model.get_input_embeddings().weight.T  # [tokens / 7, V]
    F.cross_entropy(predicted, tokens[::7]).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


def bench(model: PreTrainedModel, longest: int, limit: float) -> dict:
    """Time both ways for one longest length and compare their results, in rounds until `limit` seconds are over."""
    rows = texts(longest)
    tokens = torch.from_numpy(np.concatenate([row["input_ids"] for row in rows]))
    batches = {}
    for way, (layout, _) in WAYS.items():
        batch = PackCollator(layout=layout)(rows)
        batches[way] = {name: value for name, value in batch.items() if name not in (*LABELS, "seq_idx")}
    seconds = {what: {way: [] for way in WAYS} for what in ("forward", "training step")}
    outputs, gradients = {}, {}
    padded, flat = WAYS
    with torch.no_grad():  # once, to warm up
        for way, (_, attention) in WAYS.items():
            model.set_attn_implementation(attention)
            forward(model, batches[way])
    end = time.perf_counter() + limit
    while len(seconds["forward"][flat]) < 2 or time.perf_counter() < end:
        for way, (_, attention) in WAYS.items():
            model.set_attn_implementation(attention)
            began = time.perf_counter()
            with torch.no_grad():
                outputs[way] = forward(model, batches[way])
            between = time.perf_counter()
            gradients[way] = training_step(model, batches[way], tokens)
            seconds["forward"][way].append(between - began)
            seconds["training step"][way].append(time.perf_counter() - between)
        print(f"longest {longest}: round {len(seconds['forward'][flat])} done", file=sys.stderr)
    difference = (outputs[padded] - outputs[flat]).abs().max().item()
    gradient = ((gradients[padded] - gradients[flat]).norm() / gradients[padded].norm()).item()
    assert difference < 1e-5 and gradient < 1e-4, f"not the same: outputs {difference}, gradients {gradient}"
    medians = {what: {way: statistics.median(times) for way, times in ways.items()} for what, ways in seconds.items()}
    return {
        "longest": longest,
        "tokens": len(tokens),
        "real_share": len(tokens) / (TEXTS * longest),
        "seconds": seconds,
        "faster": {what: ways[padded] / ways[flat] for what, ways in medians.items()},
        "tokens_per_second": {what: {w: len(tokens) / s for w, s in ways.items()} for what, ways in medians.items()},
        "largest_output_difference": difference,
        "relative_gradient_difference": gradient,
    }


def markdown(result: dict) -> str:
    padded, flat = WAYS
    lines = [
        "# Padding-free BERT",
        "",
        "How much faster is an encoder whose batch is one row without padding?",
        "",
        f"BERT-base ({result['parameters'] / 1e6:.0f}M random weights, float32), {TEXTS} texts per batch, lengths",
        f"uniform in [0.2, 1] x the longest: sdpa on the padded batch against `{NAME}` on one flat row. Real tokens",
        "per second, medians of interleaved rounds; outputs and gradients are the same.",
        "",
        "| longest | real tokens | what | padded | flat | faster | rounds | outputs differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in result["lengths"]:
        for what, rates in found["tokens_per_second"].items():
            cells = [str(found["longest"]), f"{found['real_share']:.0%}", what]
            cells += [f"{rates[padded]:,.0f}/s", f"{rates[flat]:,.0f}/s", f"**{found['faster'][what]:.2f}x**"]
            cells.append(str(len(found["seconds"][what][padded])))
            lines.append(f"| {' | '.join(cells)} | {found['largest_output_difference']:.0e} |")
    lines += limits(
        "Random weights, one distribution of lengths (about 60% of the padded tokens are real) and a CPU; the more even "
        "the lengths, the smaller the gain. ByteTransformer itself, whose kernels also fuse other operations, did not run."
    )
    lines += origin_lines(result, "torch", "transformers")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=50, help="for one length (default 50), at least two rounds")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look (default 12)")
    parser.add_argument("--longest", type=int, nargs="+", default=list(LONGEST))
    parser.add_argument("--out", type=Path, default=RESULTS / "encoder", help="default results/encoder")
    arguments = parser.parse_args()
    register()
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=arguments.layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModel.from_config(config, add_pooling_layer=False).train()
    result = origin("encoder") | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "lengths": [bench(model, longest, arguments.seconds) for longest in arguments.longest],
    }
    store(arguments.out, result, page := markdown(result))
    print(page)


if __name__ == "__main__":
    main()
