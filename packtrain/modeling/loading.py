"""Tokenizer, model and adapter, loaded or made from scratch, with errors that say what to do.

What transformers lets pass is checked here: a config field that doesn't exist, a dropout above 1, weights that the
checkpoint lacks, a tokenizer with more tokens than the model has rows, filler that would silently be the end token.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from packtrain.errors import ModelError, refused_by
from packtrain.modeling.attention import register
from packtrain.modeling.hub_errors import explained, first_line
from packtrain.modeling.router_loss import refuse_router_loss
from packtrain.modeling.tokenizer import train_bpe
from packtrain.recipe.values import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(
    *,
    tokenizer_name_or_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    chat_template: str | Path | None = None,
    corpus: Iterable[str] = (),
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or a byte-level BPE trained on `corpus`; it always has a pad token.

    Args:
        chat_template: path of a Jinja file that replaces the tokenizer's own template.
        corpus: read only where a tokenizer is trained.

    Raises:
        ModelError: the tokenizer can't be had, or the template can't be read.
    """
    if tokenizer_name_or_path is None:
        assert vocab_size is not None, "a tokenizer is either named or trained"
        tokenizer = train_bpe(corpus, vocab_size)
    else:
        warn_of_code(tokenizer_name_or_path, revision, trust_remote_code)
        with explained("model.tokenizer_name_or_path", tokenizer_name_or_path, revision):
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_name_or_path, revision=revision, trust_remote_code=trust_remote_code
            )
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "give the path of a UTF-8 Jinja file"
            raise ModelError(
                f"cannot be read: {error}", key="model.chat_template", value=str(chat_template), fix=fix
            ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _filler(tokenizer)
        logger.warning("the tokenizer has no pad token; filler is %s", tokenizer.pad_token)
    return tokenizer


def _filler(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that text needs least: one made for padding, a reserved one, unk, and at last eos.

    Even eos is safe: labels are masked by position, never by token id, so the real end stays in the loss.
    """
    vocabulary = sorted(tokenizer.get_added_vocab()) or sorted(tokenizer.get_vocab())
    for pattern in (r"[<\[|]+(\w+_)?pad(_\w+)?[>\]|]+", r"[<\[|]+(reserved|unused)\w*[>\]|]+"):
        for token in vocabulary:
            if re.fullmatch(pattern, token, re.IGNORECASE):
                return token
    for token in (tokenizer.unk_token, tokenizer.eos_token):
        if token is not None:
            return token
    fix = "name another with `model.tokenizer_name_or_path`"
    raise ModelError("the tokenizer has no pad, unk or eos token to fill with", fix=fix)


# ------------------------------------------------------------------------------------------------------ model


@functools.cache
def warn_of_code(name: str, revision: str | None, trusted: bool) -> None:
    """Once for each name: that code which comes with a model may run here."""
    if trusted:
        at = f" at revision {revision}" if revision else ""
        logger.warning("model.trust_remote_code: code that comes with %s%s may run in this process", name, at)


def load_config(
    *,
    model_name_or_path: str | None = None,
    config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Collection[int] = (),
) -> PreTrainedConfig:
    """The config of a pretrained model, or one from scratch from the fields in `config` (with `model_type`).

    From scratch, the vocabulary size and the special token ids are the tokenizer's unless given.

    Args:
        new_tokens: ids of the tokenizer that the model need not have yet: rows will be made for them.

    Raises:
        ModelError: the model can't be had, a field doesn't exist, or the tokenizer doesn't fit the model.
    """
    if model_name_or_path is not None:
        warn_of_code(model_name_or_path, revision, trust_remote_code)
        with explained("model.model_name_or_path", model_name_or_path, revision):
            result = AutoConfig.from_pretrained(
                model_name_or_path, revision=revision, trust_remote_code=trust_remote_code
            )
    else:
        result = _config_from_scratch(config or {}, tokenizer)
    rows = getattr(result.get_text_config(), "vocab_size", None)
    if tokenizer is not None and rows is not None and rows + sum(id >= rows for id in new_tokens) < len(tokenizer):
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}"
        key = "model.config.vocab_size" if model_name_or_path is None else "model.tokenizer_name_or_path"
        raise ModelError(what, key=key, fix="use the model's own tokenizer, or a larger `vocab_size`")
    return result


def _config_from_scratch(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    model_type = given.get("model_type")
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(str(model_type), CONFIG_MAPPING)
        fix = f"did you mean {near}?" if near else "name an architecture of transformers, for example llama"
        raise ModelError("is not an architecture", key="model.config.model_type", value=model_type, fix=fix)
    of_tokenizer = {}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        of_tokenizer = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    settings = of_tokenizer | {name: value for name, value in given.items() if name != "model_type"}
    try:
        config = CONFIG_MAPPING[model_type](**settings)
    except Exception as error:  # whatever a config class meets in its arithmetic
        reason = str(error.__cause__ or error).strip()
        raise ModelError(f"{model_type} can't be built so: {reason}", key="model.config") from error
    for path, owner, near in _unknown_fields(config, given):
        fix = f"did you mean {near}?" if near else f"see the fields of {owner}"
        raise ModelError(f"is not a field of {owner}", key=f"model.config.{path}", fix=fix)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ModelError("is no probability", key=f"model.config.{name}", value=value, fix="from 0 up to 1")
    return config


def _unknown_fields(config: PreTrainedConfig, given: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """`(name, config class, field that was probably meant)`. transformers keeps a field it doesn't know as an
    attribute, without a word; older names that it translates (`rope_theta`) don't stay."""
    known = {field.name for field in fields(config)} | set(config.attribute_map) | {"model_type"}
    for name, value in given.items():
        if name in config.sub_configs and isinstance(value, dict):
            for path, owner, near in _unknown_fields(getattr(config, name), value):
                yield f"{name}.{path}", owner, near
        elif name not in known and name in vars(config):
            yield name, type(config).__name__, did_you_mean(name, known)


def _auto_class(config: PreTrainedConfig) -> type:
    """AutoModelForCausalLM, unless the model's own code knows AutoModel only (Dream)."""
    auto_map = getattr(config, "auto_map", None) or {}
    return AutoModel if "AutoModel" in auto_map and "AutoModelForCausalLM" not in auto_map else AutoModelForCausalLM


def load_model(
    config: PreTrainedConfig,
    *,
    model_name_or_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    attn_implementation: str,
) -> PreTrainedModel:
    """The causal LM of `config`, pretrained or with new weights, which torch's global generator draws.

    Args:
        dtype: auto (as stored; float32 from scratch), float32, bfloat16 or float16, of the weights.
        attn_implementation: what `attention.choose_implementation` has chosen.

    Raises:
        ModelError: not a causal LM, weights missing from the checkpoint, an attention it doesn't support, or a router
            loss that the objectives don't have.
    """
    register()
    refuse_router_loss(config)
    key = "model.model_name_or_path" if model_name_or_path else "model.config"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise ModelError(f"{config.model_type} is not a causal language model", key=key)
    with explained(key, model_name_or_path or config.model_type, revision):
        if model_name_or_path is None:
            dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
            with refused_by("transformers", "model.config", vars(config)):
                model = _from_scratch(config, dtype=dtype, attn_implementation=attn_implementation)
        else:
            model, found = _auto_class(config).from_pretrained(
                model_name_or_path,
                config=config,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,  # reported below, with the missing ones
                output_loading_info=True,
            )
            if lacking := sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}):
                what = f"the checkpoint lacks {len(lacking)} weights of the model, such as {lacking[0]}"
                raise ModelError(what, key=key, value=model_name_or_path, fix="name a complete causal language model")
    return model


def _from_scratch(config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """New weights, the same for the same seed whether ZeRO-3 shards them or not.

    Under ZeRO-3 transformers skips what torch draws when modules are made, before it draws the weights themselves;
    the same is done here without it.
    """
    if is_deepspeed_zero3_enabled():
        return AutoModelForCausalLM.from_config(config, **how)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **how)
    model.init_weights()
    return model


# ------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model: PreTrainedModel, lora: dict[str, Any], *, gradient_checkpointing: bool = False) -> PeftModel:
    """`model` with a LoRA adapter; everything else is frozen.

    Args:
        lora: fields of `peft.LoraConfig`; `task_type` is CAUSAL_LM unless given.
        gradient_checkpointing: lets gradients through the frozen embeddings, which checkpointed layers need.

    Raises:
        ModelError: peft refuses the settings, or the model has no module of that name.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and not every run has an adapter

    try:
        adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
    except Exception as error:  # also of regular expressions and indices that peft does not check
        fix = None
        if "target modules" in str(error).lower():
            linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            names = sorted({name.rpartition(".")[2] for name in linear})
            fix = f"`lora.target_modules` may be all-linear or a list of some of {', '.join(names)}"
        raise ModelError(f"no adapter: {first_line(error)}", key="lora", value=lora, fix=fix) from error
    if gradient_checkpointing:
        model.enable_input_require_grads()
    trainable, frozen = count_parameters(adapted)
    logger.info("LoRA: %s parameters are trained, %s are frozen", f"{trainable:,}", f"{frozen:,}")
    return adapted


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, frozen)`; shared weights count once, and ZeRO-3's shards as the whole they are part of."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return counts[True], counts[False]
