"""The sections of a recipe and their keys, but for `objective:`, whose keys stand with each objective.

`training:` and `lora:` take the libraries' own fields under the libraries' own names: any
`transformers.TrainingArguments` and any `peft.LoraConfig` field (see `fields`); `training:` those of `TrainingKeys`, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from packtrain.recipe import fields
from packtrain.recipe.fields import Amount, Flag, NotNegative, Positive, Text, VocabSize

# Rules between keys are functions `(settings, strategy) -> verdicts`. The settings are "section.key" -> checked value, our
# own keys also where they have their defaults; a verdict is the key, what is wrong, and the fix.
Settings = Mapping[str, Any]
Verdicts = Iterator[tuple[str, str, str]]

MAX_LENGTH = 2048
MAX_TOKENS = 16384
STRATEGY = "balanced"
EXAMPLES_PER_STEP = 64
MAX_SKIPPED_UPDATES = 10
WORKER_TIMEOUT = 300
BUFFER_SIZE = 10_000
SCORES = ("loss", "perplexity", "el2n")  # of examples, as `packtrain score` writes them


class Section(BaseModel):
    """A frozen section that takes no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSection(Section):
    """Which model: a pretrained one by name, or one from scratch by `config`."""

    model_name_or_path: Text | None = None
    """Hub name or directory of a pretrained model."""
    config: fields.Mapping | None = None
    """Trains from scratch: the architecture's own fields, for example {model_type: llama, hidden_size: 256}."""
    revision: Text | None = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: Flag = False
    """Runs code that comes with the model; needs a pinned revision."""
    dtype: Dtype = "auto"
    """Of the weights; auto is as stored, and float32 from scratch."""
    quantization: fields.Mapping | None = None
    """QLoRA: fields of transformers.BitsAndBytesConfig, for example {load_in_4bit: true, bnb_4bit_quant_type: nf4}."""
    merge_adapter: Text | None = None
    """Folder of a LoRA adapter, or of its run, that is merged into the pretrained model before training."""
    continue_adapter: Text | None = None
    """Folder of a LoRA adapter, or of its run, that is trained further, with its own settings in the place of `lora:`."""
    attn_implementation: Text = "auto"
    """auto, packtrain_varlen, sdpa, eager, flex_attention, flash_attention_2, ..."""
    tokenizer_name_or_path: Text | None = None
    """Hub name or directory of another tokenizer than the model's own."""
    tokenizer_vocab_size: VocabSize | None = None
    """Trains a byte-level BPE of that size on the data: on the first 20,000 rows of each source."""
    chat_template: Text | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""


class MixtureSource(Section):
    """One source of `data.mixture`; what it leaves out is as in `data:`."""

    path: fields.Paths
    """As data.path."""
    weight: fields.Weight
    """Its share of the examples of an epoch, relative to the other sources."""
    name: Text | None = None
    """Configuration of a Hub dataset."""
    split: Text | None = None
    """As data.split."""
    format: Text | None = None
    """As data.format."""
    columns: fields.Columns | None = None
    """As data.columns."""
    roles: fields.Roles | None = None
    """As data.roles."""
    num_rows: Positive | None = None
    """The first rows only."""


Mixture = Annotated[list[MixtureSource], Field(min_length=1), "a list of mappings with path and weight"]


class KeepSection(Section):
    """Which share of the training examples is kept, by a score of each or at random."""

    by: Literal["loss", "perplexity", "el2n", "random"]
    """The score that decides, as `packtrain score` writes it, or random."""
    share: fields.Share
    """How many of the training examples are kept."""
    which: Literal["high", "low", "middle"] | None = None
    """Which scores are kept; high by default."""
    scores: Text | None = None
    """File of `packtrain score`."""
    seed: fields.Seed | None = None
    """Of a random choice; training.seed by default."""


Keep = Annotated[KeepSection, "a mapping with by and share"]


class DataSection(Section):
    """Which rows, and how they become examples."""

    path: fields.Paths | None = None
    """A file, directory, pattern (data/*.jsonl), Hub dataset, packtrain:arithmetic, :trend or :preference; or a list."""
    mixture: Mixture | None = None
    """Instead of path: sources with weights, [{path: a.jsonl, weight: 2}, ...]; see `packtrain keys data`."""
    name: Text | None = None
    """Configuration of a Hub dataset."""
    split: Text = "train"
    """Split to train on."""
    format: Text = "auto"
    """Format of the rows; auto goes by the columns."""
    columns: fields.Columns | None = None
    """Names of the rows' columns, {prompt: question}; {system: null} leaves one out."""
    roles: fields.Roles | None = None
    """Names of speakers beyond the usual ones, {customer: user, agent: assistant}."""
    max_length: Positive = MAX_LENGTH
    """Most tokens of one example."""
    overflow: Literal["error", "truncate", "drop", "split"] = "error"
    """What happens to longer examples."""
    completion_only_loss: Flag | None = None
    """Learns completions only. Default: where rows have prompt and completion; for diffusion, everywhere."""
    assistant_only_loss: Flag = False
    """Learns what the assistant says in a conversation; with completion_only_loss, in the completion."""
    on_lost_content: Literal["error", "warn"] = "error"
    """What happens to conversations of which the chat template leaves something out."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to rows that can't be trained on."""
    num_rows: Positive | None = None
    """The first rows only; packtrain:arithmetic makes that many."""
    eval_path: fields.Paths | None = None
    """Rows to evaluate on, from another place."""
    eval_split: Text | None = None
    """Split to evaluate on."""
    eval_size: Amount = 0
    """Held out from the training rows: a number of rows, or a share below 1."""
    keep: Keep | None = None
    """Trains on a share of the examples, {by: el2n, share: 0.7, which: high, scores: out/scores.parquet}."""
    num_proc: Positive | None = None
    """Processes that tokenise."""
    streaming: Flag = False
    """Reads and tokenises rows while the model trains, without counting or storing them; needs training.max_steps."""
    buffer_size: Positive | None = None
    """Of streamed rows, how many examples are read at once and shuffled together. Default: 10,000."""
    worker_timeout: Positive = WORKER_TIMEOUT
    """Seconds to wait for a batch of a data-loading worker."""

    @property
    def paths(self) -> str | list[str]:
        """`path`, where there is no mixture."""
        return self.path or []

    @property
    def sources(self) -> list[MixtureSource]:
        """The sources of the mixture; none where there is a path."""
        return self.mixture or []

    @property
    def shown(self) -> str:
        """The path or the sources in a few words, for messages."""
        if self.mixture is not None:
            return f"a mixture of {len(self.mixture)} sources"
        paths = [self.path] if isinstance(self.path, str) else self.path or []
        return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


class PhaseSection(Section):
    """The beginning of the first epoch, or what follows it: short examples, and more of them in an update."""

    until: fields.Share
    """Share of the first epoch's tokens at which the phase ends."""
    max_length: Positive
    """Most tokens of its examples; longer ones come later, whole."""


Phases = Annotated[list[PhaseSection], Field(min_length=1), "a list of phases"]


class BatchingSection(Section):
    """How the examples of a step are laid out in memory."""

    strategy: Text = STRATEGY
    """A strategy by name, or my_package.my_module:function; `packtrain plan RECIPE --all` compares them."""
    examples_per_step: Positive = EXAMPLES_PER_STEP
    """Examples per update, over all devices."""
    max_tokens: Positive = MAX_TOKENS
    """Most tokens in one micro-batch: the knob for memory."""
    tokens_per_step: Positive | None = None
    """Tokens per update, for strategies that pack the whole epoch."""
    shapes: Positive | None = None
    """Pads micro-batches to at most so many numbers of tokens, for torch_compile. Default: no padding."""
    schedule: Phases | None = None
    """Short examples first, in the first epoch, at the same tokens per update: [{until: 0.3, max_length: 128}, ...]."""
    probe_memory: Flag | None = None
    """Tries the largest micro-batch before the first update. Default: on a GPU."""
    allow_contamination: Flag = False
    """Trains although attention leaks between the documents of a batch."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens to an update whose loss or gradient is NaN or infinite."""
    max_skipped_updates: Positive = MAX_SKIPPED_UPDATES
    """Skipped updates after which the run stops too."""


class TrainingKeys(Section):
    """The keys of `training:` that are packtrain's, next to the fields of TrainingArguments."""

    early_stopping_patience: Positive | None = None
    """Evaluations in a row without a better held-out loss (or metric_for_best_model) after which the run stops."""
    early_stopping_threshold: NotNegative | None = None
    """How much better an evaluation must be to count. Default: 0."""
    sample_prompts: Annotated[list[Text], Field(min_length=1)] | None = None
    """Prompts that the model answers at every evaluation, printed and kept in samples.jsonl."""


def library_arguments(training: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of `training:` that is TrainingArguments'."""
    return {key: value for key, value in training.items() if key not in TrainingKeys.model_fields}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The part of `training:` that a plan depends on.

    Attributes:
        seed: of every shuffle.
        num_epochs: may be fractional.
        max_steps: updates of the run; overrides `num_epochs` when positive.
        gradient_accumulation_steps: micro-batches per rank and update; "auto" for the fewest that fit.
    """

    seed: int = 0
    num_epochs: float = 3.0
    max_steps: int = -1
    gradient_accumulation_steps: int | Literal["auto"] = "auto"

    @classmethod
    def of(cls, training: Mapping[str, Any]) -> Schedule:
        """Reads a recipe's `training:` section, with TrainingArguments' defaults for what it leaves out."""
        data_seed = training.get("data_seed")
        return cls(
            seed=training["seed"] if data_seed is None else data_seed,
            num_epochs=training.get("num_train_epochs", cls.num_epochs),
            max_steps=training.get("max_steps", cls.max_steps),
            gradient_accumulation_steps=training.get("gradient_accumulation_steps", "auto"),
        )
