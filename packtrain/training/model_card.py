"""The model card of a run, `model/README.md`: what was trained on what, the losses, the figures and the recipe.

It holds no path of this machine and no secret, and every number in it is of the run's summary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from packtrain.recipe.recipe import Recipe
from packtrain.training.portable import portable, portable_text
from packtrain.training.summary import Summary, name_machine

TASKS = {  # the class that loads the model -> what the Hub calls what it does
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
OWN_DATA = "packtrain:"  # generated rows
_ADAPTER_FOR = "A LoRA adapter for"


def write_model_card(recipe: Recipe, summary: Summary, directory: Path) -> None:
    """Writes the card next to the model."""
    model_card(recipe, summary).save(directory / "README.md")


def write_merged_card(adapter: Path, directory: Path) -> None:
    """Writes the card of an adapter, where packtrain wrote it, next to the model that it was merged into."""
    if not (adapter / "README.md").is_file():
        return
    card = ModelCard.load(adapter / "README.md")
    if card.data.library_name == "peft" and "packtrain" in (card.data.tags or ()):
        card.data.library_name = "transformers"
        card.text = card.text.replace(_ADAPTER_FOR, "A LoRA adapter, merged into", 1)
        card.save(directory / "README.md")


def model_card(recipe: Recipe, summary: Summary) -> ModelCard:
    """Returns the card of a finished run."""
    shared = portable(recipe)
    base, rows = recipe.model.model_name_or_path, _names(shared["data"])
    adapter, objective = recipe.lora is not None, shared["objective"]["name"]
    about = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=[name for name in _names(recipe.data.model_dump()) if _is_on_the_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASKS.get(recipe.objective.auto_class) if recipe.objective.answers is False else None,
        tags=["packtrain", *(["lora"] if adapter else [])],
    )
    started = (
        f"`{shared['model']['model_name_or_path']}`" if base else f"a new {(recipe.model.config or {})['model_type']}"
    )
    lines = [
        f"# {summary.recipe}",
        "",
        f"{_ADAPTER_FOR if adapter else 'Trained from'} {started}, with the objective `{objective}`, on "
        f"{summary.examples:,} examples ({', '.join(f'`{name}`' for name in rows)}), by packtrain.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in _figures(recipe, summary)),
        "",
        "## Recipe",
        "",
        "```yaml",
        portable_text(recipe).rstrip(),
        "```",
        "",
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n".join(lines))


def _figures(recipe: Recipe, summary: Summary) -> list[tuple[str, str]]:
    """Returns (name, text) of what was measured."""
    pairs = {
        "held-out loss, before and after": (summary.held_out_loss_before, summary.held_out_loss_after),
        "training loss, first and last logged": (summary.train_loss_first, summary.train_loss_last),
    }
    figures = [
        (name, f"{first:.4f} -> {last:.4f}") for name, (first, last) in pairs.items() if None not in (first, last)
    ]
    if summary.best_step is not None:
        figures.append(("weights", f"of step {summary.best_step:,}, the best evaluation"))
    batching = recipe.batching
    scheduled = ", more of them in the phases of short ones" if batching.schedule else ""
    figures += [
        ("updates", f"{summary.updates:,}, of {batching.examples_per_step:,} examples{scheduled}"),
        ("epochs", f"{summary.epochs:g}"),
        ("tokens", f"{summary.real_tokens:,}, {summary.supervised_tokens:,} of them supervised{summary.since}"),
        ("strategy", f"`{summary.strategy}`, at most {batching.max_tokens:,} tokens per micro-batch"),
    ]
    if summary.padding_share is not None:
        figures.append(("padding", f"{summary.padding_share:.2%}{summary.since}"))
    if summary.real_tokens_per_second is not None:
        figures.append(("real tokens/s", f"{summary.real_tokens_per_second:,.0f}{summary.since}"))
    frozen = f", {summary.frozen_parameters:,} frozen" if summary.frozen_parameters else ""
    ranks = f", {summary.world_size} ranks" if summary.world_size > 1 else ""
    return [
        *figures,
        ("parameters", f"{summary.trainable_parameters:,} trained{frozen}"),
        ("machine", name_machine(summary.machine) + ranks),
        ("versions", ", ".join(f"{name} {number}" for name, number in summary.versions.items())),
    ]


def _names(data: dict[str, Any]) -> list[str]:
    """Returns the paths of a section `data:`, of a mixture those of its sources."""
    paths = [data["path"], *(source["path"] for source in data["mixture"] or ())]
    return [name for path in paths if path for name in ([path] if isinstance(path, str) else path)]


def _is_on_the_hub(name: str) -> bool:
    return not (name.startswith(OWN_DATA) or Path(name).exists() or Path(name).suffix or set("*?[~") & set(name))
