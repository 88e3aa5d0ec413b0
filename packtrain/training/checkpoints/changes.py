"""What differs between the run that wrote a checkpoint and the run that would resume it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packtrain.errors import HIDDEN, hidden, shorten
from packtrain.recipe.sections import DEFAULTS

# Keys that change neither which examples an update sees nor, but for the order of summation, what it learns from them;
# and the length of the run, which changes the learning rate from here on. An engine that can't read the states of another
# says so itself (`resharding.py`).
_SAFE = re.compile(
    r"""training\.(run_name|project|report_to|disable_tqdm|max_steps|num_train_epochs|use_cpu|deepspeed|fsdp|fsdp_config
        |gradient_accumulation_steps|gradient_checkpointing|gradient_checkpointing_kwargs|ddp_timeout|push_to_hub
        |(logging|log|save|eval|dataloader|hub|trackio)_\w+)
    |data\.(num_proc|worker_timeout|eval_path|eval_split)
    |batching\.(strategy|max_tokens|probe_memory|on_nonfinite|max_skipped_updates|allow_contamination)
    |model\.attn_implementation""",
    re.VERBOSE,
)
_PLACE = "training.output_dir"  # where a run lies is no part of it: it may be moved
_SECRET = re.compile(r"(?i)(.*_)?(hub_token|password|passwd|secret|api_key|access_key)")
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference; `safe` ones may be accepted with `--allow-changes`."""

    key: str
    then: Any
    now: Any
    safe: bool

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.then)} then, {_shown(self.now)} now"


def changes(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Change]:
    """Differences between a checkpoint's manifest and the facts of this run (see `checkpoint.facts_of`)."""
    found = []
    if manifest.get("recipe") and facts.get("recipe"):
        then, now = dict(_leaves(manifest["recipe"])), dict(_leaves(facts["recipe"]))
        for key in sorted(then.keys() | now.keys()):
            # A key that came with a later release has its default's effect where it is absent.
            pair = then.get(key, DEFAULTS.get(key, _ABSENT)), now.get(key, DEFAULTS.get(key, _ABSENT))
            if pair[0] != pair[1] and key != _PLACE:
                safe = _SAFE.fullmatch(key) is not None
                found.append(Change(key=key, then=pair[0], now=pair[1], safe=safe))
    words = {"data_fingerprint": "the examples (their tokens)", "plan_hash": "the plan (which examples share a step)"}
    for name, what in words.items():
        if manifest.get(name) != facts.get(name):
            then, now = (str(source.get(name))[:12] for source in (manifest, facts))
            found.append(Change(key=what, then=then, now=now, safe=False))
    return found


def redacted(tree: Any) -> Any:
    """Plain data without secrets: values of keys like `hub_token`, and what looks like one, become `***`."""
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN if value and _SECRET.fullmatch(str(key)) else redacted(value) for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return hidden(tree) if isinstance(tree, str) else tree


def _leaves(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`section.key` -> value; a section that is absent has no leaves."""
    for section, values in recipe.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in values.items())


def _shown(value: Any) -> str:
    return "unset" if value is _ABSENT else hidden(shorten(value))
