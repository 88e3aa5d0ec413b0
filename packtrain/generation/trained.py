"""A trained model, found by the folder of its run, by its own folder, or by its name on the Hub.

out/sft                   a run of packtrain: recipe.yaml, summary.json and model/
out/sft/model             a model, or an adapter that names its base
Qwen/Qwen3-0.6B           a model of the Hub
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from packtrain.errors import ModelError
from packtrain.modeling.adapters import merge_adapter
from packtrain.modeling.hub import explained
from packtrain.modeling.loading import load_config, load_model
from packtrain.modeling.tokenizer import load_tokenizer
from packtrain.modeling.trained_on import check_base, read_trained_on
from packtrain.recipe.fields import did_you_mean
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import Dtype, ModelSection

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that is ready to answer, in eval mode.

    Attributes:
        model: the model, or its base with the adapter on it.
        tokenizer: the one it was trained with.
        recipe: that of the run; None where only a model was named.
        prompts: how the rows were written out that it was trained on, see `DataReport.prompts`; empty where nothing says it.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None
    prompts: tuple[str, ...] = ()

    @property
    def chat(self) -> bool:
        """Whether prompts are the user's turns of a conversation."""
        return is_chat(self.tokenizer, self.prompts)

    @property
    def has_adapter(self) -> bool:
        return not isinstance(self.model, PreTrainedModel)


def load_trained(
    target: str | Path, *, base: bool = False, dtype: Dtype = "auto", device: str | None = None
) -> Trained:
    """Loads a run's model, or any causal language model.

    Args:
        target: the folder of a run, of a model or of an adapter, or a name on the Hub.
        base: leaves the adapter out, or takes the pretrained model that the run started from.
        dtype: of the weights: auto (as stored; of a base from scratch as it was trained), float32, bfloat16 or float16.
        device: where the model is put; CUDA where there is one, by default.

    Raises:
        ModelError: there is no model, it can't be loaded, or the adapter's base is not to be found, or not what it was.
    """
    recipe, directory = find_model(target)
    if recipe is not None and not recipe.objective.predicts_next:
        fix = (
            "`packtrain sample` and `packtrain evaluate` are for masked-diffusion models"
            if recipe.objective.answers
            else None
        )
        what = "was trained with an objective that does not predict the next token, so it writes no text"
        raise ModelError(what, key="RUN_OR_MODEL", value=str(target), fix=fix)
    name = str(directory or target)
    section = recipe.model if recipe is not None else ModelSection(model_name_or_path=name)
    own = ModelSection(model_name_or_path=name, trust_remote_code=section.trust_remote_code, dtype=dtype)
    with _told_of(str(target), directory):
        tokenizer = load_tokenizer(own)
        if directory is not None and (directory / _ADAPTER).is_file():
            model = _load_base(directory, recipe, tokenizer, dtype)
            if not base:
                model = _with_adapter(model, directory)
        elif base:
            if recipe is None or section.model_name_or_path is None:
                what = (
                    "has no base: it was trained from scratch"
                    if recipe
                    else "is not a run or an adapter, and has no base"
                )
                raise ModelError(what, key="--base", value=str(target), fix="leave --base out")
            model = _load_first(section, tokenizer, dtype)
        else:
            model = _load(own, tokenizer)
    model.config.use_cache = True
    model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    known = read_trained_on(name)
    return Trained(model=model.eval(), tokenizer=tokenizer, recipe=recipe, prompts=known.prompts if known else ())


@contextmanager
def _told_of(target: str, directory: Path | None) -> Iterator[None]:
    """Names what was asked for in the errors of loading, which name the key of a recipe.

    Args:
        directory: of the model; None for a name on the Hub, or of a folder that is not there.
    """
    try:
        yield
    except ModelError as error:
        if error.key == "model.model_name_or_path":
            if error.value in (target, str(directory)):
                error.key = "RUN_OR_MODEL"
            else:
                error.where, error.key = f"the base of {target}", None
                if directory is not None and (directory / _ADAPTER).is_file() and error.what.startswith("is neither"):
                    place = f"`base_model_name_or_path` of {directory / _ADAPTER}"
                    error.fix = f"run it where its run was started, or write where the base is now into {place}"
        if directory is None and error.what.startswith(("is neither", "is not in the local cache")):
            folder = Path(target)
            near = did_you_mean(folder.name, (path.name for path in folder.parent.glob("*") if path.is_dir()))
            names, more = "name the output_dir of a run, the folder of a model, or a model of the Hub", error.fix
            if error.what.startswith("is not"):
                error.what = f"is not a folder here, and as a model of the Hub it {error.what}"
                more = "the Hub's are fetched once, with a connection"
            error.fix = f"did you mean {folder.with_name(near)}?" if near else f"{names}; {more}"
        raise


def is_chat(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> bool:
    """Returns whether prompts are the user's turns of a conversation, for a model that was trained on such rows.

    Args:
        prompts: how the rows were written out; where nothing says it, a chat template decides.
    """
    return bool(tokenizer.chat_template) and (not prompts or "conversation" in prompts)


def find_model(target: str | Path) -> tuple[Recipe | None, Path | None]:
    """Returns the recipe of a run, and the folder of its model; (None, None) for a name on the Hub.

    Raises:
        ModelError: there is no such folder, or a run without a model.
    """
    folder = Path(target)
    if not folder.is_dir():
        if folder.exists() or str(target).startswith(("/", ".", "~")):
            fix = "name the output_dir of a run, the folder of a model, or a model of the Hub"
            raise ModelError("is not a folder", key="RUN_OR_MODEL", value=str(target), fix=fix)
        return None, None
    run = folder if (folder / "recipe.yaml").is_file() else folder.parent
    recipe = load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
    if folder == run:
        folder = run / "model"
        if not folder.is_dir():
            fix = "let the run end (`packtrain train RECIPE --resume`), or name one of its checkpoints"
            raise ModelError("holds a run without a model yet", key="RUN_OR_MODEL", value=str(target), fix=fix)
    elif not folder.name.startswith(("model", "checkpoint-")):
        recipe = None  # a folder that happens to lie next to a recipe
    if not any((folder / name).is_file() for name in ("config.json", _ADAPTER)):
        fix = "train first, or name the output_dir of a run or the folder of a model"
        raise ModelError("holds neither a run nor a model", key="RUN_OR_MODEL", value=str(target), fix=fix)
    return recipe, folder


def _load(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = load_config(section, tokenizer=tokenizer, new_tokens=range(len(tokenizer)))
    return load_model(section, config, attn_implementation=None)


def _load_first(section: ModelSection, tokenizer: PreTrainedTokenizerBase, dtype: Dtype) -> PreTrainedModel:
    """Loads what a run started from, with the adapter that it merged into its model, if any; draws one from scratch as the
    run did, in the dtype of its recipe."""
    if section.model_name_or_path is not None and section.merge_adapter is None:
        return _load(section.model_copy(update={"dtype": dtype}), tokenizer)
    model = merge_adapter(_load(section, tokenizer), section)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _load_base(
    directory: Path, recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase, dtype: Dtype
) -> PreTrainedModel:
    """Loads the model that an adapter was trained on; one that was made from scratch is made again, from the same seed."""
    settings: dict[str, Any] = json.loads((directory / _ADAPTER).read_text(encoding="utf-8"))
    name = settings.get("base_model_name_or_path")
    own = recipe is None or (recipe.model.model_name_or_path is not None and recipe.model.merge_adapter is None)
    if name and own:
        trust = recipe is not None and recipe.model.trust_remote_code
        revision = settings.get("revision") or (recipe.model.revision if recipe is not None else None)
        section = ModelSection(model_name_or_path=name, revision=revision, trust_remote_code=trust)
    elif recipe is None:
        fix = "name the output_dir of its run, whose recipe says how its base was made"
        raise ModelError("is an adapter that names no base model", key="RUN_OR_MODEL", value=str(directory), fix=fix)
    else:
        section = recipe.model
        set_seed(int(recipe.training.get("seed", 42)))
    model = _load_first(section, tokenizer, dtype)
    check_base(directory, section, model.config)
    return model


def _with_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    from peft import PeftModel

    with explained("RUN_OR_MODEL", str(directory)):
        return PeftModel.from_pretrained(model, str(directory))
