"""The verbs `sample` and `evaluate`, for models trained with the objective `masked_diffusion`.

    packtrain train    recipes/rainbow_cpu.yaml
    packtrain sample   recipes/rainbow_cpu.yaml --prompt "Mia has 3 coins. ..." --length 64
    packtrain evaluate recipes/rainbow_cpu.yaml --lengths 64,128,256 --blocks 1,4

Both read the model from the recipe's `output_dir`; `evaluate` gives it the held-out prompts, and writes a table, the
figures and two pictures next to the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from packtrain.errors import PacktrainError
from packtrain.generation.held_out import check_held_out
from packtrain.generation.prompts import encode_prompts
from packtrain.generation.scores import FINAL
from packtrain.modeling.adapters import merge_adapter
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.loading import load_config, load_model
from packtrain.modeling.tokenizer import load_tokenizer
from packtrain.modeling.trained_on import check_base
from packtrain.objectives.masked_diffusion import MaskedDiffusion
from packtrain.objectives.masked_diffusion.evaluation import Judge, Measured, Verdict, markdown, measure
from packtrain.objectives.masked_diffusion.generation import generate
from packtrain.objectives.masked_diffusion.loss import make_bidirectional
from packtrain.objectives.masked_diffusion.pictures import draw_lengths, draw_unmasking
from packtrain.objectives.masked_diffusion.sampling import Samples, Sampling
from packtrain.objectives.masked_diffusion.tails import TailedExamples
from packtrain.objectives.tail_tokens import TailTokens
from packtrain.objectives.task import load_task
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained diffusion model and what it was trained on."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    tokens: TailTokens
    examples: TailedExamples  # held out where there are any
    shift: bool

    def sampling(self, **options: Any) -> Sampling:
        """Makes a `Sampling` that knows the model's end and pads: any of them ends an answer, and sampling stops there.

        Args:
            options: of `Sampling`. A tail that isn't sampled (`void`) is banned.

        Raises:
            PacktrainError: another `end_token_policy` for such a tail.
        """
        tail = self.tokens.tail
        ends = (tail.eos_token_id, *tail.pad_token_ids)
        if not tail.is_sampled:
            policy = options.get("end_token_policy", "none")
            if policy not in ("none", "ban_pad"):
                what = f"does not go with the tail `{tail.kind}`, whose padding token is always banned"
                raise PacktrainError(what, key="end_token_policy", value=policy, fix="leave it out")
            options["end_token_policy"] = "ban_pad"
        options.setdefault("early_stop", True)
        return Sampling(end_token_ids=ends, pad_token_ids=tail.pad_token_ids, **options)

    def generate(self, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling, *, seed: int = 0) -> Samples:
        """Answers tokenised prompts."""
        generator = torch.Generator(next(self.model.parameters()).device).manual_seed(seed)
        return generate(
            self.model,
            prompts,
            length,
            sampling,
            mask_token_id=self.tokens.mask_token_id,
            shift=self.shift,
            generator=generator,
        )


def find_trained(recipe: Recipe) -> tuple[MaskedDiffusion, Path]:
    """Returns the objective and the folder of the model of a recipe, before anything is loaded.

    Raises:
        PacktrainError: another objective, or nothing trained yet.
    """
    if not isinstance(recipe.objective, MaskedDiffusion):
        what, fix = "cannot be sampled by diffusion", "use a recipe with `objective.name: masked_diffusion`"
        raise PacktrainError(what, key="objective.name", value=recipe.objective.name, fix=fix)
    directory = Path(recipe.training["output_dir"]) / "model"
    if not directory.is_dir():
        fix = "train the recipe first"
        raise PacktrainError("there is no model yet", key="training.output_dir", value=str(directory), fix=fix)
    return recipe.objective, directory


def load_trained(recipe: Recipe) -> Trained:
    """Loads the model in `output_dir/model`, full or adapter, with the tokens it was trained with.

    Raises:
        PacktrainError: another objective, nothing trained yet, or trained with other tokens.
    """
    objective, directory = find_trained(recipe)
    task, section = load_task(recipe), recipe.model
    saved = ModelSection(model_name_or_path=str(directory), trust_remote_code=section.trust_remote_code)
    if load_tokenizer(saved).get_vocab() != task.tokenizer.get_vocab():
        what = "was trained with different tokens than this recipe has"
        fix = "pass the same --set options as for training, especially those of data and objective"
        raise PacktrainError(what, key="training.output_dir", value=str(directory), fix=fix)
    attention = "sdpa" if section.trust_remote_code else NAME
    if (directory / "adapter_config.json").exists():
        from peft import PeftModel

        config = load_config(section, tokenizer=task.tokenizer, new_tokens=task.new_tokens)
        set_seed(int(recipe.training.get("seed", 42)))  # which draws the weights of a base from scratch, as in training
        base = merge_adapter(load_model(section, config, attn_implementation=attention), section)
        check_base(directory, section, config)
        task.prepare(base)
        model = PeftModel.from_pretrained(base, str(directory))
    else:
        saved = saved.model_copy(update={"dtype": section.dtype})
        model = load_model(saved, load_config(saved), attn_implementation=attention)
        make_bidirectional(model)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.eval()
    examples = task.train if task.held_out is None else task.held_out
    assert isinstance(examples, TailedExamples)
    return Trained(
        model=model,
        tokenizer=task.tokenizer,
        tokens=task.tokens,
        examples=examples,
        shift=objective.shift,
    )


def sample(recipe: Recipe, prompts: Sequence[str], *, length: int = 128, seed: int = 0, **options: Any) -> list[str]:
    """Answers prompts, as text up to their end.

    Args:
        prompts: text; as a user's turn where the training data are conversations.
        length: canvas.
        options: of `Sampling` (`steps`, `block_length`, `remasking`, `temperature` ...); one step per token by default.
    """
    trained = load_trained(recipe)
    tokenizer = trained.tokenizer
    ids = encode_prompts(tokenizer, prompts, trained.examples.report.prompts)
    sampling = trained.sampling(**{"steps": length} | options)
    return [str(tokenizer.decode(answer)) for answer in trained.generate(ids, length, sampling, seed=seed).answers()]


def evaluate(
    recipe: Recipe, *, lengths: Sequence[int], blocks: Sequence[int] = (1,), prompts: int = 64, **options: Any
) -> str:
    """Answers held-out prompts at every length and number of blocks; returns the table, and stores it with pictures.

    Args:
        prompts: how many; examples whose answer doesn't fit the shortest length are left out.
        options: of `Sampling`; one step per token by default.
    """
    trained = load_trained(recipe)
    check_held_out(recipe, load_task(recipe).held_out)
    examples, tail = trained.examples, trained.tokens.tail
    ids = [i for i in range(len(examples)) if examples.answers[i] < min(lengths)][:prompts]
    if not ids:
        fix = f"choose {int(examples.answers.min()) + 1} or more for the shortest"
        raise PacktrainError("is too short for every answer", key="lengths", value=min(lengths), fix=fix)
    asked, references = zip(*(split_example(examples, i) for i in ids), strict=True)
    judge, reference_length = judge_of(trained, references), sum(map(len, references)) / len(references)
    directory = Path(recipe.training["output_dir"]) / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Measured]] = []
    for count in blocks:
        for length in lengths:
            sampling = trained.sampling(**{"steps": length, "block_length": length // count} | options)
            samples = trained.generate(asked, length, sampling)
            row = measure(samples, reference_length, judge, blocks=count, steps=sampling.steps)
            rows.append((tail.kind, row))
            picture = directory / f"unmasking-{length}-{count}.png"
            draw_unmasking(samples, picture, eos=tail.eos_token_id, pads=tail.pad_token_ids)
    curves = {f"{tail.kind}, {count} blocks": [row for _, row in rows if row.blocks == count] for count in blocks}
    draw_lengths(curves, directory / "lengths.png")
    table = markdown(rows, label="tail")
    (directory / "evaluation.md").write_text(table + "\n")
    (directory / "evaluation.json").write_text(json.dumps([asdict(row) for _, row in rows], indent=1) + "\n")
    return table


def split_example(examples: TailedExamples, example_id: int) -> tuple[list[int], list[int]]:
    """Splits an example into (prompt, answer), token ids."""
    ids = examples[example_id]["input_ids"].tolist()
    content, answer = int(examples.contents[example_id]), int(examples.answers[example_id])
    return ids[: content - answer], ids[content - answer : content]


def judge_of(trained: Trained, references: Sequence[Sequence[int]]) -> Judge:
    """Makes the judge of answers by their references.

    early, late: by the reference's length. exact: the reference, and an end right behind it. content: the same final
    answer (`#### 42`) before the end or, where the reference has none, its tokens whatever follows.
    """
    tail, decode = trained.tokens.tail, trained.tokenizer.decode
    ends = {tail.eos_token_id, *tail.pad_token_ids}

    def judge(row: int, tokens: list[int]) -> Verdict:
        reference = list(references[row])
        written = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        content = begins = tokens[: len(reference)] == reference
        if right := FINAL.search(str(decode(reference))):
            given = FINAL.search(str(decode(tokens[:written])))
            content = given is not None and given[1] == right[1]
        early, late = written < len(reference), written > len(reference)
        return Verdict(early=early, late=late, exact=begins and not (early or late), content=content)

    return judge
