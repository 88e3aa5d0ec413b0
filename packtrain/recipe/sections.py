"""The sections of a recipe and their keys. Every key we own is on this page.

`training:` and `lora:` take the libraries' own fields under the libraries' own names: any
`transformers.TrainingArguments` and any `peft.LoraConfig` field (see `reflection`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from packtrain.recipe.reflection import library_fields
from packtrain.recipe.values import Amount, Flag, Mapping, Positive, Text, Whole


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# The 256 bytes and the special tokens come first.
VocabSize = Annotated[Whole, Field(ge=264), "a whole number from 264 on"]


Seed = Annotated[Whole, Field(ge=0, lt=2**32), "a whole number from 0 to 2^32 - 1"]  # numpy takes no other


class ModelSection(_Section):
    """Which model: a pretrained one by name, or one from scratch by `config`."""

    model_name_or_path: Text | None = None
    config: Mapping | None = None  # of the architecture: {model_type: llama, hidden_size: 256, ...}
    revision: Text | None = None
    trust_remote_code: Flag = False  # needs a pinned revision
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Text = "auto"  # packtrain_varlen, sdpa, eager, flex_attention, flash_attention_2, ...
    tokenizer_name_or_path: Text | None = None  # default: the model's own
    tokenizer_vocab_size: VocabSize | None = None  # trains a byte-level BPE of that size on the data
    chat_template: Text | None = None  # path of a Jinja file


class DataSection(_Section):
    """Which rows, and what becomes of them."""

    path: Text  # a file, a directory, a Hub name, or packtrain:arithmetic
    name: Text | None = None  # configuration of a Hub dataset
    split: Text = "train"
    format: Text = "auto"
    max_length: Positive = 2048  # tokens of one example
    overflow: Literal["error", "truncate", "drop", "split"] = "error"  # of examples longer than that
    completion_only_loss: Flag | None = None  # default: of rows with prompt and completion; diffusion: of all
    assistant_only_loss: Flag = False
    on_bad_row: Literal["error", "skip"] = "error"
    num_rows: Positive | None = None  # the first rows only; packtrain:arithmetic makes that many
    eval_path: Text | None = None
    eval_split: Text | None = None
    eval_size: Amount = 0  # held out from `path`: rows, or a share below 1
    num_proc: Positive | None = None
    worker_timeout: Positive = 300  # seconds to wait for a batch of a data worker


class BatchingSection(_Section):
    """How the examples of a step are laid out in memory."""

    strategy: Text = "balanced"
    examples_per_step: Positive = 64  # per update, over all devices
    max_tokens: Positive = 16384  # of one micro-batch
    tokens_per_step: Positive | None = None  # for strategies that pack the whole epoch
    probe_memory: Flag | None = None  # try the largest micro-batch before the first update; default: on a GPU
    allow_contamination: Flag = False  # train although documents of a batch see each other
    on_nonfinite: Literal["stop", "skip"] = "stop"  # an update whose loss or gradient is NaN or infinite
    max_skipped_updates: Positive = 10  # after which `skip` stops too


class ObjectiveSection(_Section):
    """What is learnt."""

    name: Literal["causal_lm", "masked_diffusion", "block_diffusion"] = "causal_lm"
    loss_weighting: Literal["token", "example"] = "token"  # of causal_lm
    weight: Literal["1/p", "none"] = "1/p"  # from here on of masked_diffusion; 1/p and sequence are LLaDA's
    norm: Literal["sequence", "token"] = "sequence"
    shift: Flag = False  # logits predict the next token (Dream)
    mask_token: Text | None = None  # default: the tokenizer's own, or a new one; of block_diffusion too
    tail: Literal["none", "eos", "single", "rainbow", "random"] = "none"
    pad_count: Positive = 7  # K of rainbow and random
    pad_tokens: list[Text] | None = None  # reserved tokens of the vocabulary; default: new ones
    canvas: Literal["batch_max", "fixed", "multiple_of", "sampled"] | None = None  # room for answer, eos and tail
    canvas_size: Positive | None = None  # tokens; of all but batch_max
    block_size: Positive = 32  # of block_diffusion


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a recipe came from, for messages and for the record."""

    path: str
    overrides: tuple[str, ...] = ()


class Recipe(_Section):
    """A checked recipe. `load_recipe` makes one; `Recipe.model_validate(recipe.to_dict())` gives it back."""

    model: ModelSection
    data: DataSection
    batching: BatchingSection = BatchingSection()
    objective: ObjectiveSection = ObjectiveSection()
    lora: Mapping | None = None  # any peft.LoraConfig field; absent for full fine-tuning
    training: Mapping  # any transformers.TrainingArguments field
    _sources: Sources | None = PrivateAttr(default=None)

    @property
    def sources(self) -> Sources | None:
        """The path and overrides it was read from; None for a recipe made in Python."""
        return self._sources

    def to_dict(self, *, given: bool = False) -> dict[str, Any]:
        """Plain data (dicts, lists, scalars) for JSON or YAML, with every default written out, or `given` without."""
        return self.model_dump(mode="json", exclude_defaults=given)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of `to_dict()`: equal recipes, equal hash."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


OWN_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "batching": BatchingSection,
    "objective": ObjectiveSection,
}
LIBRARY_SECTIONS = {
    "training": "transformers.training_args.TrainingArguments",
    "lora": "peft.tuners.lora.config.LoraConfig",
}
SECTIONS = (*OWN_SECTIONS, *LIBRARY_SECTIONS)
# Where a recipe may say more, or must say more, than the library's annotation.
_REFINED: dict[str, dict[str, Any]] = {
    "training": {
        "output_dir": Annotated[Text, AfterValidator(os.path.expanduser)],
        "seed": Seed,
        "data_seed": Seed | None,
        "dataloader_num_workers": Annotated[Whole, Field(ge=0), "a whole number from 0 on"],
        "gradient_accumulation_steps": Positive | Literal["auto"],
        "fsdp": Flag | Text | list[Text],  # annotated `str | None`, documented as `fsdp=True`
    },
    "lora": {},
}
DEFAULTS: dict[str, Any] = {
    f"{section}.{name}": field.get_default()
    for section, fields in OWN_SECTIONS.items()
    for name, field in fields.model_fields.items()
    if not field.is_required()
}
TRAINING_DEFAULTS = {"seed": 42, "gradient_accumulation_steps": "auto"}


@functools.cache
def fields_of(section: str) -> dict[str, Any]:
    """Key -> type of a section. Empty where the library is not installed."""
    if section in OWN_SECTIONS:
        return get_type_hints(OWN_SECTIONS[section], include_extras=True)
    fields = library_fields(LIBRARY_SECTIONS[section])
    return fields | _REFINED[section] if fields else {}
