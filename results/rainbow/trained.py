"""Tunes the same tiny model with five tails, and samples from it at one, two and four times the length that is needed.

    python results/rainbow/run.py --seeds 0 1 2 3 4 5      # half an hour on one core

The task is `walks.py`. A tiny bidirectional Llama first learns to walk from answers without tails, until nearly all of its
answers are right on a canvas of their true length (the *ceiling*: what a model would reach that knows where to stop). Each
tail then tunes a copy of it. Each seed and tail has a file of results as soon as it is done, and is not trained again.

The setting was chosen for the ceiling and the run time, after a pilot of one seed. Rounding decides enough in training
that another processor gives other numbers from the same seeds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from packtrain.modeling.attention.varlen import register
from packtrain.objectives.masked_diffusion.evaluation import Judge, Measured, Verdict, measure
from packtrain.objectives.masked_diffusion.generation import generate
from packtrain.objectives.masked_diffusion.loss import make_bidirectional, masked_diffusion, sums_by_part
from packtrain.objectives.masked_diffusion.noise import Masking, NoisingCollator
from packtrain.objectives.masked_diffusion.pictures import draw_unmasking
from packtrain.objectives.masked_diffusion.sampling import Samples, Sampling
from packtrain.objectives.masked_diffusion.tails import Canvas, Tail, TailedExamples
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import make_plan
from packtrain.training.summary import describe_machine, package_versions
from results.rainbow.walks import EOS, FILLER, FIRST_PAD, FIRST_WORD, MASK, PADS, Walks

MASKING = Masking(mask_token_id=MASK)
ALL_PADS = tuple(range(FIRST_PAD, FIRST_PAD + PADS))
TAILS = {
    "eos": Tail(kind="eos", eos_token_id=EOS),
    "single": Tail(kind="single", eos_token_id=EOS, pad_token_ids=ALL_PADS[:1]),
    "rainbow K=3": Tail(kind="rainbow", eos_token_id=EOS, pad_token_ids=ALL_PADS[:3]),
    "rainbow K=7": Tail(kind="rainbow", eos_token_id=EOS, pad_token_ids=ALL_PADS),
    "void": Tail(kind="void", eos_token_id=EOS, pad_token_ids=ALL_PADS[:1]),
}
NO_TAIL = Tail(kind="none", eos_token_id=EOS)
ROOM = 7  # the shortest canvas asked for: the longest walk and its eos


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Holds what a run depends on, apart from its seed and tail."""

    walks: Walks = Walks(longest=ROOM - 1)
    hidden_size: int = 64
    layers: int = 1  # enough to take one step and to stop; more would see more steps ahead
    rows: int = 20_000
    examples_per_step: int = 32
    base_steps: int = 1000
    tune_steps: int = 1500
    learning_rate: float = 6e-3
    largest_canvas: int = 4 * ROOM  # of the canvases sampled in tuning
    canvases: tuple[int, ...] = (ROOM, 2 * ROOM, 4 * ROOM)  # asked for
    blocks: tuple[int, ...] = (1,)
    prompts: int = 256


def new_model(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Make a tiny Llama that attends both ways."""
    implementation = register()
    config = LlamaConfig(
        vocab_size=settings.walks.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # a prompt and a canvas are 80 tokens at most
        attn_implementation=implementation,
    )
    torch.manual_seed(seed)
    return make_bidirectional(LlamaForCausalLM(config))


def batches(examples: TailedExamples, tail: Tail, settings: Settings, *, seed: int, steps: int) -> Iterator[dict]:
    """Yield one packed batch per step."""
    plan = make_plan(
        examples.lengths,
        strategy="padding_free",
        seed=seed,
        examples_per_step=settings.examples_per_step,
        max_tokens=int(examples.lengths.max()) * settings.examples_per_step,
        max_steps=steps,
    )
    collator = NoisingCollator(MASKING, tail, seed=seed, layout="flat", pad_token_id=FILLER)
    for step in range(steps):
        epoch, _ = plan.locate(step)
        yield MicroBatches(examples, collator.at_epoch(epoch))[plan.micro_batches(step, 0)[0]]


def fit(
    model: nn.Module, examples: TailedExamples, tail: Tail, settings: Settings, *, seed: int, steps: int
) -> list[dict]:
    """Train in place. Returns the loss of each part, averaged over every tenth of the steps."""
    objective = masked_diffusion(MASKING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1, anneal_strategy="cos"
    )
    model.train()
    curve, sums = [], {}
    for step, batch in enumerate(batches(examples, tail, settings, seed=seed, steps=steps), start=1):
        losses = objective.losses(model, batch)
        loss = losses.weighted_sum() / objective.denominator(batch)
        optimizer.zero_grad()
        loss.float().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, pair in sums_by_part(losses, batch).items():
            sums[name] = sums.get(name, 0) + pair
        if step % max(steps // 10, 1) == 0:
            means = {name: round((pair[0] / pair[1]).item(), 4) for name, pair in sums.items() if pair[1] > 0}
            curve.append({"step": step, **means})
            sums = {}
    return curve


def answer(model: nn.Module, prompts: list[list[int]], canvas: int, tail: Tail, *, blocks: int = 1) -> Samples:
    """Sample one token per step, the surest first, no temperature, until the end; a tail that isn't sampled is banned."""
    sampling = Sampling(
        steps=canvas,
        block_length=canvas // blocks,
        end_token_ids=(EOS, *ALL_PADS),
        pad_token_ids=ALL_PADS,
        end_token_policy="none" if tail.is_sampled else "ban_pad",
        early_stop=True,
    )
    return generate(model, prompts, canvas, sampling, mask_token_id=MASK)


def ceiling(model: nn.Module, settings: Settings) -> float:
    """Measure the share of exact answers of a model without tails on canvases of just the length that is needed."""
    prompts, references = settings.walks.draw(settings.prompts, seed=10**6)
    exact = 0
    for length in sorted({len(places) for places in references}):
        ids = [i for i, places in enumerate(references) if len(places) == length]
        judge = judge_of(settings.walks, [references[i] for i in ids])
        samples = answer(model, [prompts[i] for i in ids], length + 1, NO_TAIL)
        exact += sum(judge(row, tokens).exact for row, tokens in enumerate(samples.tokens.tolist()))
    return exact / len(prompts)


def judge_of(walks: Walks, references: list[list[int]]) -> Judge:
    """Make a judge that goes by the places of the true answers.

    Content: the places are right up to the last one. Exact: that, and an end right behind it.
    """

    def judge(row: int, tokens: list[int]) -> Verdict:
        reference = references[row]
        written = next((i for i, token in enumerate(tokens) if token < FIRST_WORD), len(tokens))
        content = walks.places_of(tokens)[: len(reference)] == reference
        early, late = written < len(reference), written > len(reference)
        return Verdict(early=early, late=late, exact=content and not (early or late), content=content)

    return judge


def evaluate(model: nn.Module, settings: Settings, tail: Tail) -> list[Measured]:
    """Measure the model's answers to fresh prompts, at every allocated length and number of blocks."""
    prompts, references = settings.walks.draw(settings.prompts, seed=10**6)
    mean, judge = sum(map(len, references)) / len(references), judge_of(settings.walks, references)
    return [
        measure(answer(model, prompts, canvas, tail, blocks=blocks), mean, judge, blocks=blocks, steps=canvas)
        for canvas in settings.canvases
        for blocks in settings.blocks
    ]


def read_along(model: nn.Module, settings: Settings) -> dict[str, float]:
    """Ask the model for one word at a time, all words before it given: shares over `prompts / 4` answers.

    next_place: the likeliest place is the right one. stops_when_done, stops_before: the end is the likeliest token
    behind a complete answer, and behind one that isn't.
    """
    walks, canvas, count = settings.walks, settings.canvases[-1], settings.prompts // 4
    prompts, answers = walks.draw(count, seed=10**6)
    examples = walks.examples(count, seed=10**6)  # the same in words
    right, before, done = [], [], []
    for i, (prompt, places) in enumerate(zip(prompts, answers, strict=True)):
        ids, first = examples[i]["input_ids"].tolist(), len(prompt)
        rows = [ids[: first + n] + [MASK] * (canvas - n) for n in range(len(places) + 1)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(rows), use_cache=False).logits
        here = torch.stack([logits[n, first + n] for n in range(len(rows))])  # [places + 1, V]
        words = here[:, FIRST_WORD : walks.first_key].softmax(-1).unflatten(-1, (walks.places, walks.wordings)).sum(-1)
        right += [a == b for a, b in zip(words.argmax(-1).tolist(), places, strict=False)]
        *going_on, last = (here.argmax(-1) == EOS).tolist()
        before, done = [*before, *going_on], [*done, last]
    shares = {"next_place": right, "stops_when_done": done, "stops_before": before}
    return {name: sum(flags) / len(flags) for name, flags in shares.items()}


def base_model(settings: Settings, seed: int, directory: Path) -> tuple[nn.Module, list[dict]]:
    """Train a model to walk, from answers without tails, or load it from `directory`, where it is kept."""
    key = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]
    model, path = new_model(settings, seed), directory / f"base-{key}-{seed}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        return model, saved["curve"]
    examples = TailedExamples(settings.walks.examples(settings.rows, seed=seed), NO_TAIL)
    curve = fit(model, examples, NO_TAIL, settings, seed=seed, steps=settings.base_steps)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "curve": curve}, path)
    return model, curve


def run(settings: Settings, *, seeds: Sequence[int], directory: Path, scratch: Path) -> None:
    """Train and evaluate every tail for every seed that has no result yet."""
    for seed in seeds:
        for name, tail in TAILS.items():
            slug = name.replace(" ", "-")
            path = directory / "runs" / f"{seed}-{slug}.json"
            if path.exists():
                continue
            base, base_curve = base_model(settings, seed, scratch)
            model = copy.deepcopy(base)
            began = time.process_time()
            canvas = Canvas(policy="sampled", size=settings.largest_canvas)
            examples = TailedExamples(settings.walks.examples(settings.rows, seed=seed + 100), tail, canvas, seed=seed)
            curve = fit(model, examples, tail, settings, seed=seed + 100, steps=settings.tune_steps)
            result = {
                "tail": name,
                "seed": seed,
                "settings": asdict(settings),
                "base_curve": base_curve,
                "ceiling": ceiling(base.eval(), settings),
                "curve": curve,
                "reading": read_along(model.eval(), settings),
                "measured": [asdict(row) for row in evaluate(model, settings, tail)],
                "seconds": round(time.process_time() - began, 1),
                "machine": describe_machine(),
                "versions": package_versions(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            if seed == 0:  # one of them is enough to look at
                samples = answer(model, settings.walks.draw(16, seed=10**6)[0], settings.canvases[-1], tail)
                draw_unmasking(samples, directory / f"unmasking-{slug}.png", eos=EOS, pads=ALL_PADS)
            path.write_text(json.dumps(result, indent=1) + "\n")
