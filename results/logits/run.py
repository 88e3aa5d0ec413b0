"""Measures what the loss of many tokens over a large vocabulary takes, in memory and time: whole logits, chunks, TRL.

    python results/logits/run.py                   # about a quarter of an hour on one core
    python results/logits/run.py --rounds 1 --tokens 512 --long 0

One process each trains the same model on the same examples for two updates: packtrain with whole logits (what it falls
back on), packtrain in chunks, and TRL's SFTTrainer with its default loss. Ways are interleaved. Memory is the peak of
the resident set above what it was when training began; seconds are those of the second update, as packtrain compares
chunks with whole logits in the first. Losses of both updates must agree to 1e-4, or the benchmark stops.

Writes `results/logits/bench.json` and `results/logits/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packtrain.compare.statistics import Ratio, paired_ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store

LLAMA = dict(model_type="llama", vocab_size=128_256, hidden_size=256, intermediate_size=688, num_hidden_layers=2)
LLAMA |= dict(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True)
DOCUMENT = 128  # supervised tokens of an example, which has one more
UPDATES = 2
WAYS = {"whole": "packtrain, whole logits", "chunks": "packtrain, chunks", "trl": "TRL's SFTTrainer"}
ARGUMENTS = dict(
    gradient_accumulation_steps=1,
    max_steps=UPDATES,
    logging_steps=1,
    learning_rate=1e-4,
    max_grad_norm=1.0,
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)


class Peak:
    """Samples the resident set every few milliseconds while open, and updates' ends."""

    def __enter__(self) -> Peak:
        import psutil

        self.process, self.open = psutil.Process(), True
        self.start = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while self.open:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()


def trainer_of(way: str, tokens: int, output_dir: str, *, config: dict[str, Any] = LLAMA, **settings: Any) -> Any:
    """The trainer of one way, with `tokens` supervised tokens in an update; `settings` are fields of its arguments."""
    import datasets
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from packtrain.data.examples import Examples
    from packtrain.modeling.attention.varlen import register
    from packtrain.objectives import chunks
    from packtrain.packing.collator import PackCollator
    from packtrain.packing.plan import make_plan
    from packtrain.training.trainer import PackTrainer

    register()
    count = tokens // DOCUMENT
    ids = np.random.default_rng(0).integers(8, config["vocab_size"], (count, DOCUMENT + 1)).tolist()
    rows = datasets.Dataset.from_list([{"input_ids": row, "labels": [-100] + row[1:]} for row in ids])
    torch.manual_seed(0)
    architecture = AutoConfig.for_model(**config)
    settings = ARGUMENTS | settings
    if way == "trl":
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        from packtrain.modeling.tokenizer import train_bpe

        backend = train_bpe(["a few words"], 300)
        tokenizer = backend if isinstance(backend, PreTrainedTokenizerFast) else PreTrainedTokenizerFast(backend)
        args = SFTConfig(
            output_dir=output_dir,
            max_length=None,
            gradient_checkpointing=False,
            per_device_train_batch_size=count,
            **settings,
        )
        model = AutoModelForCausalLM.from_config(architecture)
        return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    from transformers import TrainingArguments

    chunks.CHUNK_BYTES = chunks.CHUNK_BYTES if way == "chunks" else 2**50
    plan = make_plan(
        np.full(count, DOCUMENT + 1),
        strategy="padding_free",
        examples_per_step=count,
        max_tokens=count * (DOCUMENT + 1),
        max_steps=settings["max_steps"],
    )
    args = TrainingArguments(output_dir=output_dir, per_device_train_batch_size=1, ignore_data_skip=True, **settings)
    return PackTrainer(
        AutoModelForCausalLM.from_config(architecture, attn_implementation="packtrain_varlen"),
        args,
        train_examples=Examples.from_dataset(rows),
        plan=plan,
        collator=PackCollator(layout="flat", pad_token_id=0),
    )


def work(way: str, tokens: int) -> dict[str, Any]:
    """Trains in this process and returns peak memory, seconds and losses."""
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    torch.set_num_threads(1)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(way, tokens, directory)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock)
        with Peak() as peak:
            began = time.perf_counter()
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, *others = (end - start for start, end in zip([began, *ends], ends, strict=False))
    return {"peak": peak.most - peak.start, "first": first, "seconds": statistics.median(others), "losses": losses}


def start(way: str, tokens: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--work", way, "--tokens", str(tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}, {tokens} tokens: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{way:7s} {tokens:6d} tokens  peak {found['peak'] / 2**30:5.2f} GiB  {found['seconds']:6.1f} s", flush=True)
    return found


def compare(tokens: int, rounds: int, ways: tuple[str, ...]) -> dict[str, Any]:
    """Runs the ways in turns; every other round begins with the last."""
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            found[way].append(start(way, tokens))
    reference = found[ways[0]][0]["losses"]
    for way, runs in found.items():
        worst = max(abs(a / b - 1) for run in runs for a, b in zip(run["losses"], reference, strict=True))
        assert worst < 1e-4, f"{way}: the losses differ by {worst}"
    result: dict[str, Any] = {"tokens": tokens, "runs": found}
    for figure in ("peak", "seconds", "first"):
        result[figure] = {way: statistics.median(run[figure] for run in runs) for way, runs in found.items()}
    for figure in ("peak", "seconds"):
        ours = [run[figure] for run in found["chunks"]]
        result[f"{figure}_of_chunks"] = {
            way: asdict(paired_ratio(ours, [run[figure] for run in runs]))
            for way, runs in found.items()
            if way != "chunks"
        }
    return result


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# The loss over a large vocabulary",
        "",
        "What do memory and time of an update become when logits of all supervised positions never exist at once?",
        "",
        f"A Llama of two layers, hidden size {LLAMA['hidden_size']}, {LLAMA['vocab_size']:,} tokens, tied embeddings, in",
        f"float32 on one core; one micro-batch of examples with {DOCUMENT} supervised tokens each. Medians of",
        f"{result['rounds']} interleaved rounds; ratios of whole rounds with their 95% intervals. Memory is the peak above",
        "the start, with gradients and optimizer states; seconds are those of the second update. The first one of",
        "packtrain compares chunks with whole logits of a few positions.",
        "",
        "| supervised tokens | way | peak | chunks take | seconds | chunks take | first update |",
        "|---:|---|---:|---|---:|---|---:|",
    ]
    for case in result["cases"]:
        for way in case["peak"]:
            ratios = [
                "" if way == "chunks" else f"**{Ratio(**case[f'{figure}_of_chunks'][way]).text()}**"
                for figure in ("peak", "seconds")
            ]
            lines.append(
                f"| {case['tokens']:,} | {WAYS[way]} | {case['peak'][way] / 2**30:.2f} GiB | {ratios[0]} "
                f"| {case['seconds'][way]:.1f} | {ratios[1]} | {case['first'][way]:.1f} s |"
            )
    differing = max(
        abs(a / b - 1)
        for case in result["cases"]
        for runs in case["runs"].values()
        for run in runs
        for a, b in zip(run["losses"], case["runs"]["chunks"][0]["losses"], strict=True)
    )
    lines += ["", f"Losses of all ways and updates differ by at most {differing:.0e}, relatively."]
    lines += limits(
        "A small body under a large head, so that the head is nearly all there is; one core, float32, random tokens. On a "
        "GPU other kernels decide about time. What logits take is the same there."
    )
    lines += origin_lines(result, "torch", "transformers", "trl")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--tokens", type=int, default=4096, help="supervised tokens of an update (default 4096)")
    parser.add_argument("--long", type=int, default=16_384, help="the same without whole logits; 0: not at all")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "logits", help="default results/logits")
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.tokens)))
        return
    result = origin("logits") | {"threads": 1, "rounds": arguments.rounds, "cases": []}
    for tokens, ways in ((arguments.tokens, ("whole", "chunks", "trl")), (arguments.long, ("chunks", "trl"))):
        if tokens:
            result["cases"].append(compare(tokens, arguments.rounds if "whole" in ways else 1, ways))
            store(arguments.out, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
