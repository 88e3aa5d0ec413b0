"""Finds settings that are fine one by one and wrong together.

Each rule says which key to use instead. A setting that would be ignored is refused as well (see `DECIDED_BY_US`):
nothing in a recipe is without effect. Strategies and objectives bring the rules of what contradicts them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from packtrain.objectives import OBJECTIVES
from packtrain.packing import strategies
from packtrain.packing.lengths import LONGEST, MOST_EPOCHS
from packtrain.packing.strategies import Strategy
from packtrain.recipe.fields import QUANTIZATION, check, did_you_mean
from packtrain.recipe.sections import SCORES, Settings, Verdicts

SECRETS = ("training.hub_token",)  # never shown


def contradictions(settings: Settings, strategy: Strategy | None) -> Verdicts:
    """Runs every rule: the recipe's own, the strategy's and the objective's.

    A rule that needs a key missing from `settings` (it was unreadable) says nothing.

    Args:
        strategy: None where there is no strategy of that name; its rules and the objective's are left out.
    """
    rules: list[Callable[..., Verdicts]] = [*RULES]
    if strategy is not None:
        objective = OBJECTIVES.get(settings.get("objective.name", ""))
        rules += [*strategies.RULES, *(objective.rules if objective else ())]
    for rule in rules:
        try:
            yield from rule(settings, strategy)
        except KeyError:
            continue


def _decided_by_us(settings: Settings, strategy: Strategy | None) -> Verdicts:
    for name, (allowed, why, fix) in DECIDED_BY_US.items():
        key = f"training.{name}"
        if key in settings and (allowed is NEVER or settings[key] != allowed):
            yield key, f"cannot be set: {why}" if allowed is NEVER else f"must stay {allowed}: {why}", fix


def _loader_is_ours(settings: Settings, strategy: Strategy | None) -> Verdicts:
    given = settings.get("training.accelerator_config")
    for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking"):
        if isinstance(given, Mapping) and name in given:
            what = f"cannot set `{name}`: the plan deals micro-batches to ranks, not accelerate"
            yield "training.accelerator_config", what, f"leave `{name}` out"


def _names_are_plain(settings: Settings, strategy: Strategy | None) -> Verdicts:
    for key in ("training.output_dir", "training.run_name"):
        name = settings.get(key)
        if isinstance(name, str) and (not name.isprintable() or ".." in re.split(r"[/\\]", name)):
            yield key, "must be printable and without `..`", "write a plain path, for example results/my_run"
        elif isinstance(name, str) and "$" in name:
            fix = "write the path out; `~` is your home directory"
            yield key, "has a `$` in it, and variables are not expanded", fix


def _one_precision(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings.get("training.bf16") and settings.get("training.fp16"):
        yield "training.fp16", "contradicts `training.bf16`", "keep one of them"


def _overflow_is_the_scalers(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings.get("training.fp16") and settings["batching.on_nonfinite"] == "skip":
        fix = "use bf16, or on_nonfinite: stop; the scaler skips updates whose gradients overflow"
        yield "batching.on_nonfinite", "cannot be `skip` with `training.fp16`, whose scaler needs every gradient", fix


def _some_training(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings.get("training.num_train_epochs", 1) <= 0 and settings.get("training.max_steps", -1) <= 0:
        yield "training.num_train_epochs", "trains for no epoch and no step", "set it above 0"
    elif (steps := settings.get("training.max_steps", -1)) < 1 and steps != -1:  # the default of TrainingArguments
        fix = "set it, or leave it out to train by `num_train_epochs`"
        yield "training.max_steps", "must be greater than 0", fix
    if settings.get("training.num_train_epochs", 1) > MOST_EPOCHS:
        yield "training.num_train_epochs", f"must be at most {MOST_EPOCHS:,}", "set `training.max_steps` instead"


def _one_model(settings: Settings, strategy: Strategy | None) -> Verdicts:
    name, config = settings["model.model_name_or_path"], settings["model.config"]
    if name and config is not None:
        fix = "keep `model_name_or_path` to fine-tune, or `config` to train from scratch"
        yield "model.config", "contradicts `model.model_name_or_path`", fix
    if not name and config is None:
        fix = "set `model.model_name_or_path` (Hub name or directory) or `model.config` (from scratch)"
        yield "model", "names no model", fix


def _config_names_architecture(settings: Settings, strategy: Strategy | None) -> Verdicts:
    config = settings["model.config"]
    if config is not None and not isinstance(config.get("model_type"), str):
        yield "model.config", "lacks `model_type`", "name the architecture, for example `model_type: llama`"


def _adapter_has_its_base(settings: Settings, strategy: Strategy | None) -> Verdicts:
    merged, continued = settings["model.merge_adapter"], settings["model.continue_adapter"]
    if merged and continued:
        fix = "keep `merge_adapter` to train something new on top of it, or `continue_adapter` to train it further"
        yield "model.merge_adapter", "contradicts `model.continue_adapter`", fix
    for key, given in (("model.merge_adapter", merged), ("model.continue_adapter", continued)):
        if given and not settings["model.model_name_or_path"]:
            yield (
                key,
                "has no effect without a pretrained model",
                "set `model.model_name_or_path` to the adapter's base",
            )
    if merged and settings["model.quantization"] is not None:
        fix = "merge it once with `packtrain merge`, and name the merged model in `model.model_name_or_path`"
        yield "model.merge_adapter", "cannot be merged into quantised weights", fix


def _adapter_keeps_its_settings(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings["model.continue_adapter"] and any(key.startswith("lora.") for key in settings):
        fix = "leave the section `lora:` out, or use `merge_adapter` to put a new adapter on top"
        yield "model.continue_adapter", "contradicts `lora:`: the adapter keeps the settings it was made with", fix


def _quantization_fits(settings: Settings, strategy: Strategy | None) -> Verdicts:
    given, key = settings["model.quantization"], "model.quantization"
    if given is None:
        return
    for name, value in given.items():
        if name not in QUANTIZATION:
            near = did_you_mean(name, QUANTIZATION)
            yield f"{key}.{name}", "is not a field of BitsAndBytesConfig", f"did you mean {near}?" if near else ""
            continue
        _, what, fix = check(QUANTIZATION[name], value)
        if what is not None:
            yield f"{key}.{name}", what, fix or ""
    if bool(given.get("load_in_4bit")) == bool(given.get("load_in_8bit")):
        yield key, "must say to how many bits", "set one of load_in_4bit: true and load_in_8bit: true"
    if not settings["lora"]:
        what = "needs an adapter: quantised weights cannot be trained"
        yield key, what, "add a section `lora:`, for example `lora: {target_modules: all-linear}`"
    if settings["model.config"] is not None:
        yield key, "needs a pretrained model", "set `model.model_name_or_path`, or leave `quantization` out"


def _one_tokenizer(settings: Settings, strategy: Strategy | None) -> Verdicts:
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


def _revision_is_of_a_model(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings["model.revision"] and not settings["model.model_name_or_path"]:
        fix = "leave it out, or set `model.model_name_or_path`"
        yield "model.revision", "has no effect without a model to load", fix


def _remote_code_is_pinned(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if not settings["model.trust_remote_code"] or os.path.isdir(settings["model.model_name_or_path"] or ""):
        return
    if not re.fullmatch("[0-9a-f]{40}", settings["model.revision"] or ""):
        fix = "set `model.revision` to the full commit hash of the code you have read"
        yield "model.trust_remote_code", "runs code from the Hub, which must be pinned", fix


def _one_kind_of_source(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings["data.mixture"] is None:
        return
    for key, fix in (
        ("data.path", "keep `path` for one place or a list, or `mixture` for sources with weights"),
        ("data.name", "set `name` of the source in `data.mixture`"),
        ("data.num_rows", "set `num_rows` of each source in `data.mixture`"),
    ):
        if settings[key] is not None:
            yield key, "contradicts `data.mixture`", fix
    if settings["data.eval_split"] and not settings["data.eval_path"]:
        fix = "name the rows in `data.eval_path`, or hold out rows of each source with `data.eval_size: 0.05`"
        yield "data.eval_split", "does not say of which source of `data.mixture`", fix


def _sources_differ(settings: Settings, strategy: Strategy | None) -> Verdicts:
    seen: dict[tuple, int] = {}
    for number, source in enumerate(settings["data.mixture"] or ()):
        source = dict(source)
        paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
        split, format = (source.get(key) or settings[f"data.{key}"] for key in ("split", "format"))
        facts = (*(os.path.realpath(os.path.expanduser(path)) for path in paths), split, format, source.get("name"))
        if facts in seen:
            what = f"is the same source as `data.mixture.{seen[facts]}`"
            yield f"data.mixture.{number}", what, "keep one of them, with the sum of their weights"
        seen.setdefault(facts, number)


def _kept_by_something(settings: Settings, strategy: Strategy | None) -> Verdicts:
    keep = settings["data.keep"]
    if keep is None:
        return
    if keep["by"] not in SCORES:
        for name in ("scores", "which"):
            if keep.get(name) is not None:
                fix = f"leave it out, or keep by a score: {', '.join(SCORES)}"
                yield f"data.keep.{name}", "has no effect where examples are kept at random", fix
    else:
        if keep.get("scores") is None:
            fix = "name the file that `packtrain score RECIPE` has written, for example scores: out/scores.parquet"
            yield "data.keep.scores", f"is missing: there is no `{keep['by']}` of the examples", fix
        if keep.get("seed") is not None:
            yield "data.keep.seed", "has no effect where examples are kept by a score", "leave it out"
    if settings["data.mixture"] is not None:
        what = "contradicts `data.mixture`, whose weights say how many examples of each source an epoch has"
        yield "data.keep", what, "name the rows in `data.path`, which takes a list of files, or leave `keep` out"


def _one_evaluation_source(settings: Settings, strategy: Strategy | None) -> Verdicts:
    for other in ("data.eval_path", "data.eval_split"):
        if settings["data.eval_size"] and settings[other]:
            fix = "keep one: evaluation data are either held out or named"
            yield "data.eval_size", f"contradicts `{other}`", fix


def _evaluation_is_held_out(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings["data.mixture"] is not None:
        return
    same_path = settings["data.eval_path"] in (None, settings["data.path"])
    named = settings["data.eval_path"] or settings["data.eval_split"]
    if named and same_path and settings["data.eval_split"] in (None, settings["data.split"]):
        key = "data.eval_split" if settings["data.eval_split"] else "data.eval_path"
        fix = "name another, or hold rows out of the training data with `data.eval_size: 0.05`"
        yield key, "names the training data", fix


def _evaluation_has_data(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if any(settings[f"data.{name}"] for name in ("eval_size", "eval_path", "eval_split")):
        return
    for key in ("training.eval_strategy", "training.eval_on_start", "training.load_best_model_at_end"):
        if settings.get(key) not in (None, "no", False):
            fix = "set `data.eval_size` (rows, or a share below 1), `data.eval_split` or `data.eval_path`"
            yield key, "needs evaluation data, and the recipe has none", fix


def _stopping_early_needs_evaluations(settings: Settings, strategy: Strategy | None) -> Verdicts:
    patience, threshold = (settings.get(f"training.early_stopping_{name}") for name in ("patience", "threshold"))
    if patience is not None and settings.get("training.eval_strategy") in (None, "no"):
        fix = "set `training.eval_strategy: epoch`, or `steps` with `training.eval_steps`"
        yield "training.early_stopping_patience", "counts evaluations during training, and there are none", fix
    if patience is None and threshold is not None:
        fix = "set `training.early_stopping_patience`, or leave it out"
        yield "training.early_stopping_threshold", "has no effect without `training.early_stopping_patience`", fix


def _samples_can_be_answered(settings: Settings, strategy: Strategy | None) -> Verdicts:
    key, objective = "training.sample_prompts", OBJECTIVES.get(settings["objective.name"])
    if settings.get(key) is None:
        return
    if objective is not None and not objective.predicts_next:
        yield (
            key,
            f"needs an objective that predicts the next token, not `{settings['objective.name']}`",
            "leave it out",
        )
    elif not any(settings[f"data.{name}"] for name in ("eval_size", "eval_path", "eval_split")):
        fix = "set `data.eval_size` (rows, or a share below 1), `data.eval_split` or `data.eval_path`"
        yield key, "is answered at every evaluation, and the recipe has no evaluation data", fix


def _streamed_without_an_end(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if not settings["data.streaming"]:
        if settings["data.buffer_size"] is not None:
            fix = "leave it out: rows that are counted are shuffled all together; or set `data.streaming: true`"
            yield "data.buffer_size", "has no effect without `data.streaming`", fix
        return
    if settings.get("training.max_steps", -1) <= 0:
        fix = "set it to the number of updates that you want; where the rows end before, the next epoch begins"
        yield "training.max_steps", "must be set with `data.streaming`: rows that are not counted have no epochs", fix
    for key, given, what, fix in (
        (
            "data.mixture",
            settings["data.mixture"],
            "cannot be streamed: its weights count the examples of every source",
            "name the rows in `data.path`, which takes a list, or leave `data.streaming` out",
        ),
        (
            "data.keep",
            settings["data.keep"],
            "chooses among all examples, and streamed rows are never all there",
            "leave it out, or leave `data.streaming` out",
        ),
        (
            "data.eval_size",
            settings["data.eval_size"],
            "chooses among all rows, and streamed rows are never all there",
            "name rows to evaluate on in `data.eval_path`",
        ),
        (
            "data.num_proc",
            settings["data.num_proc"],
            "has no effect with `data.streaming`: a thread tokenises while the model trains",
            "leave it out",
        ),
        (
            "batching.schedule",
            settings["batching.schedule"],
            "takes the short examples of an epoch first, and streamed rows have no epoch to choose from",
            "leave it out, or leave `data.streaming` out",
        ),
        (
            "batching.shapes",
            settings["batching.shapes"],
            "is found from the lengths of all examples, and nobody knows those of streamed rows",
            "leave it out, or leave `data.streaming` out",
        ),
        (
            "training.dataloader_num_workers",
            settings.get("training.dataloader_num_workers"),
            "has no effect with `data.streaming`: a thread reads ahead",
            "leave it out",
        ),
    ):
        if given:
            yield key, what, fix
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if settings.get(f"training.{name}") == "epoch":
            what = "cannot be `epoch` with `data.streaming`: nobody knows when one ends"
            yield f"training.{name}", what, f"set it to `steps`, with `training.{name.replace('strategy', 'steps')}`"
    if strategy is not None and strategy.scope == "epoch":
        keeping = ", ".join(name for name, known in strategies.STRATEGIES.items() if known.scope == "step")
        what = "packs the whole epoch, and streamed rows are never all there"
        yield "batching.strategy", what, f"choose a strategy that keeps the examples of each update: {keeping}"
    objective = OBJECTIVES.get(settings["objective.name"])
    if objective is not None and not objective.streams:
        able = ", ".join(name for name, known in OBJECTIVES.items() if known.streams)
        what = f"`{settings['objective.name']}` looks at all examples first, and streamed rows are never all there"
        yield "objective.name", what, f"choose one that takes streamed rows ({able}), or leave `data.streaming` out"


def _longest_can_be_packed(settings: Settings, strategy: Strategy | None) -> Verdicts:
    if settings["data.max_length"] > LONGEST:
        yield "data.max_length", f"must be at most {LONGEST:,}", "set it to what the model can read"


RULES = (
    _decided_by_us,
    _loader_is_ours,
    _names_are_plain,
    _one_precision,
    _overflow_is_the_scalers,
    _some_training,
    _one_model,
    _config_names_architecture,
    _adapter_has_its_base,
    _adapter_keeps_its_settings,
    _quantization_fits,
    _one_tokenizer,
    _revision_is_of_a_model,
    _remote_code_is_pinned,
    _one_kind_of_source,
    _sources_differ,
    _kept_by_something,
    _one_evaluation_source,
    _evaluation_is_held_out,
    _evaluation_has_data,
    _stopping_early_needs_evaluations,
    _samples_can_be_answered,
    _streamed_without_an_end,
    _longest_can_be_packed,
)


# `training:` key -> (the one value it may have, why another can't be, what to do). Unset is always fine.
NEVER = object()
DECIDED_BY_US: dict[str, tuple[object, str, str]] = {
    "per_device_train_batch_size": (
        NEVER,
        "the planner decides how many examples share a micro-batch",
        "set `batching.examples_per_step` (examples per update, over all devices) and `batching.max_tokens` "
        "(tokens per micro-batch)",
    ),
    "train_sampling_strategy": (
        NEVER,
        "the order of the examples belongs to the plan",
        "set `batching.strategy`",
    ),
    "length_column_name": (NEVER, "lengths come from the tokenised data", "leave it out"),
    "auto_find_batch_size": (
        False,
        "a batch size found by trial would change what an update sees",
        "lower `batching.max_tokens`: the updates stay the same",
    ),
    "dataloader_drop_last": (False, "no example is dropped", "leave it out"),
    "remove_unused_columns": (False, "the metadata of packed batches would be removed", "leave it out"),
    "logging_nan_inf_filter": (False, "a loss of NaN would be logged as 0.0", "leave it out"),
    "average_tokens_across_devices": (
        True,
        "the loss is divided by the weight of the whole step on all devices",
        "leave it out",
    ),
    "label_smoothing_factor": (0.0, "the loss has no label smoothing", "leave it out"),
    "use_cache": (False, "a cache joins the documents of a packed batch", "leave it out"),
    "resume_from_checkpoint": (
        NEVER,
        "it belongs to the command line",
        "use `packtrain train RECIPE --resume`",
    ),
    "do_train": (True, "training is what `packtrain train` does", "leave it out"),
    "do_eval": (
        NEVER,
        "a recipe with evaluation data evaluates",
        "set `data.eval_size`; set `training.eval_strategy` to evaluate before the end too",
    ),
    "per_device_eval_batch_size": (
        NEVER,
        "the planner sizes the micro-batches of evaluation, and the loss does not depend on them",
        "set `batching.max_tokens`",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        (False, "evaluation computes in the precision of training", "set `training.bf16` or `training.fp16`"),
    ),
    "prediction_loss_only": (True, "evaluation sums losses and keeps no predictions", "leave it out"),
    "include_for_metrics": ([], "evaluation sums losses and keeps nothing for metrics", "leave it out"),
    **dict.fromkeys(
        ("batch_eval_metrics", "eval_use_gather_object"),
        (False, "evaluation sums losses and has no other metrics", "leave it out"),
    ),
    "eval_do_concat_batches": (True, "evaluation keeps no predictions", "leave it out"),
    "eval_accumulation_steps": (NEVER, "evaluation keeps no predictions that would fill the device", "leave it out"),
    "dataloader_persistent_workers": (False, "every epoch starts its own workers", "leave it out"),
    "dataloader_multiprocessing_context": (NEVER, "workers are started by Python's default method", "leave it out"),
    "dataloader_in_order": (True, "micro-batches must come in the order of the plan", "leave it out"),
    "ignore_data_skip": (True, "the plan itself resumes at the update where the run stopped", "leave it out"),
    "disable_tqdm": (True, "packtrain shows its own progress bar", "leave it out"),
    "do_predict": (False, "there is nothing to predict on", "leave it out"),
    "hub_token": (NEVER, "a secret does not belong in a recipe", "set the environment variable HF_TOKEN"),
}
