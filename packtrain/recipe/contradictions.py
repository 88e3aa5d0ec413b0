"""Settings that are fine one by one and wrong together.

Each rule says which key to use instead. A setting that would be ignored is refused as well (see `decided`): nothing in a
recipe is without effect.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from packtrain.recipe.decided import DECIDED_BY_US, NEVER
from packtrain.recipe.sections import DEFAULTS

MOST_EPOCHS = 100_000  # every one is planned
LONGEST = (1 << 24) - 1  # tokens in one example: packing keeps one counter per possible length
SECRETS = ("training.hub_token",)  # never shown

Settings = Mapping[str, Any]  # "section.key" -> checked value, ours also where it is the default
Verdicts = Iterator[tuple[str, str, str]]  # (key, what is wrong, fix)


def contradictions(settings: Settings) -> Verdicts:
    """Runs every rule. One that needs a key missing from `settings` (it was unreadable) says nothing."""
    for rule in _RULES:
        try:
            yield from rule(settings)
        except KeyError:
            continue


def _decided_by_us(settings: Settings) -> Verdicts:
    for name, (allowed, why, fix) in DECIDED_BY_US.items():
        key = f"training.{name}"
        if key in settings and (allowed is NEVER or settings[key] != allowed):
            yield key, f"cannot be set: {why}" if allowed is NEVER else f"must stay {allowed}: {why}", fix


def _loader_is_ours(settings: Settings) -> Verdicts:
    given = settings.get("training.accelerator_config")
    for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking"):
        if isinstance(given, Mapping) and name in given:
            what = f"has no effect by `{name}`: the plan deals micro-batches to ranks, not accelerate"
            yield "training.accelerator_config", what, f"leave `{name}` out"


def _noise_goes_by_rows(settings: Settings) -> Verdicts:
    if settings.get("training.neftune_noise_alpha") and settings["batching.strategy"] not in _PADDED:
        what = "scales its noise by 1 / sqrt(tokens of a row), and a row of this strategy is many documents"
        fix = f"leave it out, or choose a strategy with a document to a row: {', '.join(_PADDED)}"
        yield "training.neftune_noise_alpha", what, fix


def _names_are_plain(settings: Settings) -> Verdicts:
    for key in ("training.output_dir", "training.run_name"):
        name = settings.get(key)
        if isinstance(name, str) and (not name.isprintable() or ".." in re.split(r"[/\\]", name)):
            yield key, "leads out of where it stands, or can't be printed", "write a plain path without `..`"
        elif isinstance(name, str) and "$" in name:
            yield key, "holds a `$`, and variables are not filled in", "write the path out; `~` is your home directory"


def _one_precision(settings: Settings) -> Verdicts:
    if settings.get("training.bf16") and settings.get("training.fp16"):
        yield "training.fp16", "contradicts `training.bf16`", "keep one of them"


def _overflow_is_the_scalers(settings: Settings) -> Verdicts:
    if settings.get("training.fp16") and settings["batching.on_nonfinite"] == "skip":
        fix = "use bf16, or on_nonfinite: stop; the scaler leaves updates out whose gradients overflow"
        yield "batching.on_nonfinite", "skip can't be had with `training.fp16`, whose scaler needs every gradient", fix


def _some_training(settings: Settings) -> Verdicts:
    if settings.get("training.num_train_epochs", 1) <= 0 and settings.get("training.max_steps", -1) <= 0:
        yield "training.num_train_epochs", "trains for no epoch and no step", "set it above 0"
    elif settings.get("training.max_steps") == 0:
        yield "training.max_steps", "is no limit", "set it above 0, or leave it out to train by `num_train_epochs`"
    if settings.get("training.num_train_epochs", 1) > MOST_EPOCHS:
        yield "training.num_train_epochs", f"is more than {MOST_EPOCHS:,}", "set training.max_steps instead"


def _one_model(settings: Settings) -> Verdicts:
    name, config = settings["model.model_name_or_path"], settings["model.config"]
    if name and config is not None:
        fix = "keep `model_name_or_path` to fine-tune, or `config` to train from scratch"
        yield "model.config", "contradicts `model.model_name_or_path`", fix
    if not name and config is None:
        fix = "set `model.model_name_or_path` (Hub name or directory) or `model.config` (from scratch)"
        yield "model", "names no model", fix


def _config_names_architecture(settings: Settings) -> Verdicts:
    config = settings["model.config"]
    if config is not None and not isinstance(config.get("model_type"), str):
        yield "model.config", "lacks `model_type`", "name the architecture, for example `model_type: llama`"


def _one_tokenizer(settings: Settings) -> Verdicts:
    name, config = settings["model.model_name_or_path"], settings["model.config"]
    tokenizer, vocab_size = settings["model.tokenizer_name_or_path"], settings["model.tokenizer_vocab_size"]
    if tokenizer and vocab_size:
        fix = "keep one: a tokenizer is either loaded or trained on the data"
        yield "model.tokenizer_vocab_size", "contradicts `model.tokenizer_name_or_path`", fix
    elif name and vocab_size:
        fix = "leave it out: a pretrained model keeps its own tokenizer"
        yield "model.tokenizer_vocab_size", "contradicts `model.model_name_or_path`", fix
    elif config is not None and not (name or tokenizer or vocab_size):
        fix = "set `model.tokenizer_vocab_size` to train one on the data, or `model.tokenizer_name_or_path`"
        yield "model.config", "comes without a tokenizer", fix


def _revision_is_of_a_model(settings: Settings) -> Verdicts:
    if settings["model.revision"] and not settings["model.model_name_or_path"]:
        fix = "leave it out, or set `model.model_name_or_path`"
        yield "model.revision", "has no effect without a model to load", fix


def _remote_code_is_pinned(settings: Settings) -> Verdicts:
    if not settings["model.trust_remote_code"] or os.path.isdir(settings["model.model_name_or_path"] or ""):
        return
    if not re.fullmatch("[0-9a-f]{40}", settings["model.revision"] or ""):
        fix = "set `model.revision` to the full commit hash of the code you have read"
        yield "model.trust_remote_code", "runs code from the Hub, which must be pinned", fix


def _one_loss_mask(settings: Settings) -> Verdicts:
    if settings["data.completion_only_loss"] and settings["data.assistant_only_loss"]:
        fix = "keep `completion_only_loss` for prompts with completions, `assistant_only_loss` for messages"
        yield "data.assistant_only_loss", "contradicts `data.completion_only_loss`", fix


def _one_evaluation_source(settings: Settings) -> Verdicts:
    for other in ("data.eval_path", "data.eval_split"):
        if settings["data.eval_size"] and settings[other]:
            fix = "keep one: evaluation data are either held out or named"
            yield "data.eval_size", f"contradicts `{other}`", fix


def _evaluation_is_held_out(settings: Settings) -> Verdicts:
    same_path = settings["data.eval_path"] in (None, settings["data.path"])
    named = settings["data.eval_path"] or settings["data.eval_split"]
    if named and same_path and settings["data.eval_split"] in (None, settings["data.split"]):
        key = "data.eval_split" if settings["data.eval_split"] else "data.eval_path"
        fix = "name another, or hold rows out of the training data with `data.eval_size: 0.05`"
        yield key, "is what is trained on", fix


def _evaluation_has_data(settings: Settings) -> Verdicts:
    if any(settings[f"data.{name}"] for name in ("eval_size", "eval_path", "eval_split")):
        return
    for key in ("training.eval_strategy", "training.eval_on_start", "training.load_best_model_at_end"):
        if settings.get(key) not in (None, "no", False):
            fix = "set `data.eval_size` (rows, or a share below 1), `data.eval_split` or `data.eval_path`"
            yield key, "asks for evaluation, and there are no data for it", fix


def _longest_example_fits(settings: Settings) -> Verdicts:
    max_tokens, max_length = settings["batching.max_tokens"], settings["data.max_length"]
    if max_length > LONGEST:
        yield "data.max_length", f"is more than {LONGEST:,}", "set it to what the model can read"
    if max_tokens < max_length and settings["batching.strategy"] != "wrapped":  # which cuts documents to fit
        fix = f"raise it to {max_length} or more, or lower `data.max_length` to {max_tokens}"
        yield "batching.max_tokens", f"is below `data.max_length` ({max_length}): an example may not fit", fix


_OBJECTIVE_KEYS = {  # name -> the keys it looks at
    "causal_lm": {"loss_weighting"},
    "masked_diffusion": {
        "weight", "norm", "shift", "mask_token", "tail", "pad_count", "pad_tokens", "canvas", "canvas_size",
    },
    "block_diffusion": {"mask_token", "block_size"},
}  # fmt: skip


def _objective_has_these_keys(settings: Settings) -> Verdicts:
    name = settings["objective.name"]
    for key, default in DEFAULTS.items():
        section, _, leaf = key.partition(".")
        if section == "objective" and leaf not in _OBJECTIVE_KEYS[name] | {"name"} and settings[key] != default:
            yield key, f"has no effect on `{name}`", "leave it out, or choose another `objective.name`"


def _diffusion_cuts_nothing(settings: Settings) -> Verdicts:
    name = settings["objective.name"]
    if name != "causal_lm" and settings["batching.strategy"] == "wrapped":
        fix = "choose another strategy, such as bfd"
        yield "batching.strategy", f"cuts documents, and `{name}` needs whole ones", fix


def _tail_has_a_canvas(settings: Settings) -> Verdicts:
    if settings["objective.name"] != "masked_diffusion":
        return
    tail, canvas, size = (settings[f"objective.{leaf}"] for leaf in ("tail", "canvas", "canvas_size"))
    if (tail == "none") != (canvas is None):
        fix = "choose `batch_max`, `fixed`, `multiple_of` or `sampled` for every tail but `none`"
        yield "objective.canvas", f"does not go with the tail `{tail}`", fix
    elif (size is None) != (canvas in (None, "batch_max")):
        yield "objective.canvas_size", f"does not go with the canvas `{canvas}`", "give tokens to all but `batch_max`"
    if settings["data.overflow"] in ("truncate", "split"):
        fix = "drop long rows (`overflow: drop`), or raise `data.max_length`"
        yield "data.overflow", "cuts answers, and an answer that was cut has no end to learn", fix


def _remote_code_sees_no_filler(settings: Settings) -> Verdicts:
    if not settings["model.trust_remote_code"] or settings["objective.name"] != "masked_diffusion":
        return
    if settings["objective.canvas"] != "batch_max" or settings["batching.strategy"] not in _WITHOUT_FILLER:
        what = "lays out filler or several documents in a row, which models like LLaDA and Dream can't tell apart"
        fix = f"use `objective.canvas: batch_max` with `batching.strategy: {_WITHOUT_FILLER[0]}`"
        yield "batching.strategy", what, fix


_PADDED = ("pad_max", "pad_longest", "group_by_length")  # strategies that give every document a row
_WITHOUT_FILLER = ("group_by_length", "pad_longest")  # where all documents of an update are equally long

_RULES = (
    _decided_by_us,
    _loader_is_ours,
    _noise_goes_by_rows,
    _names_are_plain,
    _one_precision,
    _overflow_is_the_scalers,
    _some_training,
    _one_model,
    _config_names_architecture,
    _one_tokenizer,
    _revision_is_of_a_model,
    _remote_code_is_pinned,
    _one_loss_mask,
    _one_evaluation_source,
    _evaluation_is_held_out,
    _evaluation_has_data,
    _longest_example_fits,
    _objective_has_these_keys,
    _diffusion_cuts_nothing,
    _tail_has_a_canvas,
    _remote_code_sees_no_filler,
)
