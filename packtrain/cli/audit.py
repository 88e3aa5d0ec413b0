"""`packtrain audit`: check whether attention leaks between the documents of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console

from packtrain.cli.options import Overrides, load_checked
from packtrain.errors import ModelError, RecipeError, refused_by

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from packtrain.modeling.audit.audit import AuditReport, Finding
    from packtrain.recipe.recipe import Recipe


TRAINS = ("eval", "train", "checkpointing")  # modes of every training run
TRAINED = ("flat", "padded")  # layouts of packtrain's batches
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
LARGEST = 1 << 30  # weights that are made up of a config


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE",
            help="Recipe (file or name), Hub name, directory, architecture (`llama`) or `config: {...}`.",
        ),
    ],
    implementations: Annotated[
        str,
        typer.Option(
            "--attn-implementation",
            metavar="NAMES",
            help="Attention implementations to try: `all`, or for example `sdpa,eager`.",
        ),
    ] = "all",
    layouts: Annotated[
        str, typer.Option("--layout", metavar="NAMES", help="Layouts to try: `all`, or for example `flat,padded`.")
    ] = "all",
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu or cuda.")] = "auto",
    overrides: Overrides = None,
) -> None:
    """Check whether attention leaks between the documents of a batch.

    The model itself is run with every attention implementation, layout and mode. Exits with 1 if the combination that the
    recipe uses leaks, or what --layout and --attn-implementation name.

    Layouts, the rows of the table:

    - `flat`: packtrain's, one row without padding, with positions and the bounds of documents

    - `positions`: the same with positions that restart, and no bounds, as stock collators do

    - `masked`: flat with an attention mask of ones

    - `rows`: several packed rows of equal length, with positions that restart

    - `padded`: one document per row, padded, with an attention mask

    Modes, its columns: `eval`; `train`; `checkpointing` of activations, in training; `cache`, with a cache of keys; `lora`
    and `prompt tuning`, with such an adapter.

    Entries: `ok`, outputs are those of each document alone; `leaks`, a document changes another's outputs, by so much;
    `wrong`, they are others than alone, though no document leaks; `refused`, it cannot run; `unclear`, the outputs hardly
    depend on the context. A number in brackets names the note below that says why.
    """
    safe = show_audit(
        target,
        Console(),
        overrides=overrides or [],
        implementations=None if implementations == "all" else implementations.split(","),
        layouts=None if layouts == "all" else layouts.split(","),
        device=device,
    )
    raise typer.Exit(0 if safe else 1)


def show_audit(
    target: str,
    console: Console,
    *,
    implementations: list[str] | None,
    layouts: list[str] | None,
    device: str,
    overrides: Sequence[str] = (),
) -> bool:
    """Audits a model and prints the report; returns False if what the recipe uses, or what was named, is not isolated.

    Args:
        target: a recipe, a Hub name, a local directory, an architecture (`llama`; a tiny random model of it), or the
            fields of a config as in a recipe (`config: {model_type: llama, num_hidden_layers: 2}`).
        implementations, layouts: None for all.
        overrides: of keys of the recipe, as `--set` has them.

    Raises:
        RecipeError, ModelError: the target can't be read or built.
    """
    import torch

    from packtrain.modeling.audit.audit import audit_model
    from packtrain.modeling.audit.causality import sees_ahead
    from packtrain.modeling.audit.probe import LAYOUTS

    if unknown := sorted(set(layouts or ()) - set(LAYOUTS)):
        raise ModelError("is not a layout", key="--layout", value=unknown[0], fix=f"choose from {', '.join(LAYOUTS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"is not available on this machine: {str(error).splitlines()[0]}"
        raise ModelError(what, key="--device", value=device, fix="choose auto, cpu or cuda") from None
    recipe = _recipe(target, overrides)
    if recipe is None and overrides:
        what, fix = "overrides keys of a recipe, and the target is a model", "leave it out, or name a recipe"
        raise ModelError(what, key="--set", value=overrides[0], fix=fix)
    model = (_of_recipe(recipe, device) if recipe else _of_name(target, console)).to(device)
    if recipe and implementations is not None:
        implementations = list(dict.fromkeys([*implementations, model.config._attn_implementation]))
    if recipe and layouts is not None:
        layouts = list(dict.fromkeys([*layouts, _layout(recipe)]))
    report = audit_model(model, implementations=implementations, layouts=layouts or tuple(LAYOUTS))
    if recipe is None:
        safe = _named_are_safe(report, implementations, layouts)
    else:
        safe, answer = _answer(recipe, report, model, sees_ahead(model) if recipe.objective.predicts_next else None)
        console.print(answer, style="bold", markup=False, soft_wrap=True)
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return safe


def _answer(recipe: Recipe, report: AuditReport, model: PreTrainedModel, moved: float | None) -> tuple[bool, str]:
    """Returns whether the recipe is isolated, and says so in a line; `moved` is how far its model sees ahead."""
    if moved is not None:
        return False, (
            f"this recipe trains a model that is not causal: a later token moves outputs before it by {moved:.0%}"
        )
    own = _own(recipe, report, model.config._attn_implementation)
    return own.safe, f"this recipe uses {own.implementation} and {own.layout} ({own.mode}): {own.what()}"


def _named_are_safe(report: AuditReport, implementations: list[str] | None, layouts: list[str] | None) -> bool:
    """Returns whether every named implementation is isolated in the named layouts (flat and padded for none).

    Where only layouts are named, each needs one implementation that is.
    """
    if implementations is None and layouts is None:
        return True
    tried = [finding for finding in report.findings if finding.mode in TRAINS]

    def safe(implementation: str, layout: str) -> bool:
        return all(f.safe for f in tried if (f.implementation, f.layout) == (implementation, layout))

    everything = list(dict.fromkeys(finding.implementation for finding in tried))
    enough = any if implementations is None else all
    return all(enough(safe(name, layout) for name in implementations or everything) for layout in layouts or TRAINED)


def _recipe(target: str, overrides: Sequence[str]) -> Recipe | None:
    """Reads a recipe by path or name; None where the target is a model."""
    from transformers import CONFIG_MAPPING

    from packtrain.recipe.shipped import find_recipe

    if Path(target).suffix not in (".yaml", ".yml"):
        if target.startswith("config:") or target in CONFIG_MAPPING or Path(target).exists():
            return None
        try:
            find_recipe(target)
        except RecipeError:
            return None
    return load_checked(Path(target), list(overrides))


def _layout(recipe: Recipe) -> str:
    from packtrain.packing.strategies import resolve_strategy

    return resolve_strategy(recipe.batching.strategy).layout


def _own(recipe: Recipe, report: AuditReport, implementation: str) -> Finding:
    """Returns the finding for what the recipe runs: the first that is not isolated, or that of its training."""
    from packtrain.modeling.attention.varlen import NAME
    from packtrain.modeling.audit.audit import PADDED

    checkpoints = recipe.training.get("gradient_checkpointing") or recipe.training.get("activation_checkpointing")
    modes = ["train", "eval", *(["checkpointing"] if checkpoints else []), *(["lora"] if recipe.lora else [])]
    layout = _layout(recipe)
    inside = next(
        (f.implementation for f in report.findings if PADDED in f.implementation and f.layout == layout), None
    )
    if inside is not None and implementation in (NAME, inside.removesuffix(PADDED)):
        implementation = inside  # as the recipe will run it
    place = (implementation, layout)
    found = [f for f in report.findings if (f.implementation, f.layout) == place and f.mode in modes]
    found.sort(key=lambda finding: modes.index(finding.mode))
    return next((finding for finding in found if not finding.safe), found[0])


def _of_recipe(recipe: Recipe, device: torch.device | str) -> PreTrainedModel:
    """Loads the recipe's model with the attention it would train with; a model from scratch needs no data for this."""
    import torch

    from packtrain.modeling.attention.varlen import choose_implementation
    from packtrain.modeling.loading import load_config, load_model

    section, objective = recipe.model, recipe.objective
    dtype = torch.float32 if section.dtype == "auto" else getattr(torch, section.dtype)
    chosen = choose_implementation(section.attn_implementation, layout=_layout(recipe), device=device, dtype=dtype)
    return load_model(
        section,
        load_config(section),
        attn_implementation=chosen,
        auto_class=objective.auto_class,
        new_weights=objective.new_weights,
    )


def _of_name(target: str, console: Console) -> PreTrainedModel:
    """Loads a model by Hub name or directory, from the fields of a config, or as a tiny random one of an architecture."""
    from transformers import CONFIG_MAPPING

    from packtrain.modeling.audit.models import enlarge, model_class, tiny_model
    from packtrain.modeling.hub import explained
    from packtrain.modeling.loading import load_config
    from packtrain.recipe.fields import did_you_mean
    from packtrain.recipe.sections import ModelSection

    if target.startswith("config:"):
        config = load_config(ModelSection(config=_fields(target)))
        with refused_by("transformers", "MODEL_OR_RECIPE", vars(config)):
            model = model_class(config).from_config(config).eval()
        enlarge(model)  # as the weights of a bare name: in new ones a leak hides below rounding
        return model
    if target in CONFIG_MAPPING and not Path(target).exists():
        return tiny_model(target)
    try:
        config = load_config(ModelSection(model_name_or_path=target))
    except ModelError as error:
        near = did_you_mean(target, CONFIG_MAPPING)
        fix = f"did you mean the architecture {near}? Or {error.fix}" if near else error.fix
        raise ModelError(error.what, key="MODEL_OR_RECIPE", value=target, fix=fix) from error
    if Path(target).is_dir() and not any(find for kind in WEIGHTS for find in Path(target).glob(kind)):
        return _of_config(target, config, console)
    with explained("MODEL_OR_RECIPE", target, None):
        return model_class(config).from_pretrained(target, config=config)


def _of_config(target: str, config: PreTrainedConfig, console: Console) -> PreTrainedModel:
    """Makes a model with random weights of a directory that holds a config and no weights, and says so."""
    import torch

    from packtrain.modeling.audit.models import enlarge, model_class

    with refused_by("transformers", "MODEL_OR_RECIPE", vars(config)):
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in model_class(config).from_config(config).parameters())
        if weights > LARGEST:
            what = f"holds a config of {weights:,} weights and no weights, and random ones are made up to {LARGEST:,}"
            fix = "audit a smaller config of its architecture: 'config: {model_type: %s, num_hidden_layers: 2, ...}', or %s"
            fix %= config.model_type, f"the architecture: `packtrain audit {config.model_type}`"
            raise ModelError(what, key="MODEL_OR_RECIPE", value=target, fix=fix)
        model = model_class(config).from_config(config).float().eval()
    enlarge(model)
    console.print(f"{target} holds no weights: its config is audited, with random ones", markup=False, soft_wrap=True)
    return model


def _fields(target: str) -> dict:
    """Turns `config: {model_type: llama}` into `{"model_type": "llama"}`."""
    try:
        fields = yaml.safe_load(target)["config"]
    except yaml.YAMLError:
        fields = None
    if not isinstance(fields, dict):
        fix = "write for example 'config: {model_type: llama, num_hidden_layers: 2}'"
        raise ModelError("is not a mapping of config fields", key="MODEL_OR_RECIPE", value=target, fix=fix)
    return fields
