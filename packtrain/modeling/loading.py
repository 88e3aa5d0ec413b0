"""Config, model and adapter of a recipe, loaded or made from scratch, with errors that say what to do.

What transformers lets pass is checked here: a config field that doesn't exist, a dropout above 1, weights that the
checkpoint lacks, a tokenizer with more tokens than the model has rows, a router loss that packtrain's losses don't have.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

from packtrain.errors import ModelError, refused_by
from packtrain.modeling.attention.varlen import NAME, check_implementation, register
from packtrain.modeling.audit.settings import switchable
from packtrain.modeling.hub import explained, first_line, warn_of_code
from packtrain.recipe.adapters import refuse_adapters
from packtrain.recipe.fields import did_you_mean
from packtrain.recipe.sections import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel


logger = logging.getLogger(__name__)


def load_config(
    section: ModelSection,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Collection[int] = (),
    fields: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Returns the config of a pretrained model, or one from scratch from the fields of `model.config`.

    From scratch, the vocabulary size and the special token ids are the tokenizer's unless given.

    Args:
        section: the recipe's `model:`.
        new_tokens: ids of the tokenizer that the model need not have yet: rows will be made for them.
        fields: set on the config, whatever it says.

    Raises:
        ModelError: the model can't be loaded, a field doesn't exist, or the tokenizer doesn't fit the model.
    """
    name = section.model_name_or_path
    if name is not None:
        refuse_adapters(name)
        warn_of_code(name, section.revision, section.trust_remote_code)
        with explained("model.model_name_or_path", name, section.revision):
            result = AutoConfig.from_pretrained(
                name, revision=section.revision, trust_remote_code=section.trust_remote_code
            )
    else:
        result = _config_from_scratch(section.config or {}, tokenizer)
    for field, value in (fields or {}).items():
        setattr(result, field, value)
    rows = getattr(result.get_text_config(), "vocab_size", None)
    if tokenizer is not None and rows is not None and rows + sum(id >= rows for id in new_tokens) < len(tokenizer):
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}"
        key = "model.config.vocab_size" if name is None else "model.tokenizer_name_or_path"
        raise ModelError(what, key=key, fix="use the model's own tokenizer, or a larger `vocab_size`")
    return result


def _config_from_scratch(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    model_type = str(given.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING)
        fix = f"did you mean {near}?" if near else "name an architecture of transformers, for example llama"
        raise ModelError(
            "is not an architecture", key="model.config.model_type", value=given.get("model_type"), fix=fix
        )
    if given.get("attn_implementation") is not None:
        check_implementation(str(given["attn_implementation"]), key="model.config.attn_implementation")
    of_tokenizer: dict[str, Any] = {}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        of_tokenizer = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    settings = of_tokenizer | {name: value for name, value in given.items() if name != "model_type"}
    try:
        config = CONFIG_MAPPING[model_type](**settings)
    except Exception as error:  # whatever a config class meets in its arithmetic
        reason = str(error.__cause__ or error).strip()
        raise ModelError(f"{model_type} cannot be built with these settings: {reason}", key="model.config") from error
    for path, owner, near in _unknown_fields(config, given):
        fix = f"did you mean {near}?" if near else f"see the fields of {owner}"
        raise ModelError(f"is not a field of {owner}", key=f"model.config.{path}", fix=fix)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ModelError(
                "must be a probability", key=f"model.config.{name}", value=value, fix="choose a value from 0 to 1"
            )
    return config


def _unknown_fields(config: PreTrainedConfig, given: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Yields `(name, config class, field that was probably meant)`. transformers keeps a field it doesn't know as
    an attribute, without a word; older names that it translates (`rope_theta`) don't stay."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | {"model_type"}
    for name, value in given.items():
        if name in config.sub_configs and isinstance(value, dict):
            for path, owner, near in _unknown_fields(getattr(config, name), value):
                yield f"{name}.{path}", owner, near
        elif name not in known and name in vars(config):
            yield name, type(config).__name__, did_you_mean(name, known)


def load_model(
    section: ModelSection,
    config: PreTrainedConfig,
    *,
    attn_implementation: str | None,
    dtype: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    new_weights: tuple[str, ...] = (),
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Returns the model of `config`, pretrained or with new weights, which torch's global generator draws.

    Args:
        section: the recipe's `model:`.
        attn_implementation: what `choose_implementation` has chosen. A model that does not look up its attention by name
            keeps its own in the place of `packtrain_varlen`.
        dtype: of the weights, in the place of the section's: auto (as stored; float32 from scratch), float32, bfloat16 or
            float16.
        auto_class: of transformers, by name.
        new_weights: what the names of weights begin with that a checkpoint may lack; they are drawn.
        device: where quantised weights are put, which are made there; others stay on the CPU.

    Raises:
        ModelError: an architecture without such a head, weights missing from the checkpoint, an attention it doesn't
            support, or a router loss that the objectives don't have.
    """
    register()
    refuse_router_loss(config)
    if attn_implementation == NAME:  # an architecture with a table of its own attentions raises KeyError for another
        model = load_model(
            section, config, attn_implementation=None, dtype=dtype, auto_class=auto_class, new_weights=new_weights
        )
        if switchable(model, NAME):
            model.set_attn_implementation(NAME)
        return model
    name, trust = section.model_name_or_path, section.trust_remote_code
    key = "model.model_name_or_path" if name else "model.config"
    auto = getattr(transformers, auto_class)
    if not has_class(config, auto_class) and not trust:
        kind = "a causal language model" if auto_class == "AutoModelForCausalLM" else f"known to {auto_class}"
        raise ModelError(f"{config.model_type} is not {kind}", key=key)
    dtype = dtype or section.dtype
    if attn_implementation is None and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        attn_implementation = "eager"  # Gemma 2: some versions of transformers pick sdpa, which leaves out the softcap
    with explained(key, name or config.model_type, section.revision):
        if name is None:
            weights = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
            with refused_by("transformers", "model.config", vars(config)):
                return _from_scratch(auto, config, dtype=weights, attn_implementation=attn_implementation)
        remote = getattr(config, "auto_map", None) or {}
        if "AutoModel" in remote and auto_class not in remote:  # its own code knows no other class (Dream)
            auto = AutoModel
        model, found = auto.from_pretrained(
            name,
            config=config,
            revision=section.revision,
            trust_remote_code=trust,
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # reported below, with the missing ones
            output_loading_info=True,
            **quantised(section, device),
        )
        lacking = found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}
        if lacking := sorted(weight for weight in lacking if not weight.startswith(new_weights or ("\0",))):
            what = f"the checkpoint lacks {len(lacking)} weights of the model, such as {lacking[0]}"
            raise ModelError(what, key=key, value=name, fix="name a complete causal language model")
        return model


def quantised(section: ModelSection, device: torch.device | None) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that quantise the weights as they are loaded; {} where none are to be.

    Raises:
        ModelError: bitsandbytes is not installed or refuses the fields, or ZeRO-3 is to shard the weights.
    """
    if section.quantization is None:
        return {}
    key = "model.quantization"
    if not is_bitsandbytes_available():
        what, fix = "needs the package bitsandbytes, which is not installed", "pip install 'packtrain[qlora]'"
        raise ModelError(what, key=key, fix=fix)
    if is_deepspeed_zero3_enabled():
        what = "does not go with ZeRO-3, which shards weights in their own dtype"
        raise ModelError(what, key=key, fix="launch with ZeRO-2 or DDP, or leave `model.quantization` out")
    fields: Any = section.quantization
    with refused_by("transformers", key, fields):
        config = BitsAndBytesConfig(**fields)
    return {"quantization_config": config, "device_map": {"": str(device or "cpu")}}


def has_class(config: PreTrainedConfig, auto_class: str = "AutoModelForCausalLM") -> bool:
    """Returns whether transformers itself has a model of this architecture for the auto class of that name."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", auto_class.removeprefix("AutoModelFor"))  # CausalLM -> Causal_LM
    return type(config) in getattr(transformers, f"MODEL_FOR_{words.upper()}_MAPPING")


def weights_dtype(section: ModelSection, config: PreTrainedConfig) -> torch.dtype:
    """Returns the dtype that `load_model` and `add_lora` give the weights; of a quantised model, those that are not."""
    if section.quantization is not None:
        return torch.float32
    named = config.dtype if section.dtype == "auto" else section.dtype
    return getattr(torch, named) if isinstance(named, str) else named or torch.float32


def _from_scratch(auto: Any, config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """Draws new weights, the same for the same seed whether ZeRO-3 shards them or not.

    Under ZeRO-3 transformers skips what torch draws when modules are made, before it draws the weights themselves;
    the same is done here without it.
    """
    if is_deepspeed_zero3_enabled():
        return auto.from_config(config, **how)
    with no_init_weights():
        model = auto.from_config(config, **how)
    model.init_weights()
    return model


# ------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model: PreTrainedModel, lora: dict[str, Any], *, gradient_checkpointing: bool = False) -> PeftModel:
    """Returns `model` with a LoRA adapter; everything else is frozen.

    Args:
        lora: fields of `peft.LoraConfig`; `task_type` is CAUSAL_LM unless given.
        gradient_checkpointing: lets gradients through the frozen embeddings, which checkpointed layers need.

    Raises:
        ModelError: peft refuses the settings, or the model has no module of that name.
    """
    from peft import (  # slow to import, and not every run has an adapter
        LoraConfig,
        get_peft_model,
        prepare_model_for_kbit_training,
    )

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **lora}
    if getattr(model, "is_quantized", False):  # freezes it; norms, embeddings and head in float32
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted = get_peft_model(model, LoraConfig(**settings))
    except Exception as error:  # also of regular expressions and indices that peft does not check
        fix = None
        if "target modules" in str(error).lower():
            linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            names = sorted({name.rpartition(".")[2] for name in linear})
            fix = f"`lora.target_modules` may be all-linear or a list of some of {', '.join(names)}"
        raise ModelError(
            f"the adapter cannot be created: {first_line(error)}", key="lora", value=lora, fix=fix
        ) from error
    if gradient_checkpointing:
        model.enable_input_require_grads()
    trainable, frozen = count_parameters(adapted)
    logger.info("LoRA: %s parameters are trained, %s are frozen", f"{trainable:,}", f"{frozen:,}")
    return adapted


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts `(trainable, frozen)`; shared weights count once, and ZeRO-3's shards as the whole they are part of."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return counts[True], counts[False]


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names the parameters and buffers that hold NaN or infinity, as far as this rank has them."""
    named = (*model.named_parameters(), *model.named_buffers())
    here = ((name, value.to_local() if isinstance(value, DTensor) else value) for name, value in named)
    floats = ((name, value) for name, value in here if value.is_floating_point() and not value.is_meta)
    return [name for name, value in floats if not value.isfinite().all()]


def of_weights(names: list[str]) -> str:
    """Says in a message which weights are not finite; nothing where all are."""
    others = f" and {len(names) - 1} other weights" if len(names) > 1 else ""
    return f", as its weights hold NaN or infinity: {names[0]}{others}" if names else ""


COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def has_router_loss(config: PreTrainedConfig) -> bool:
    """Returns whether the model's own loss adds one for its routers.

    Such a loss is not a sum over tokens: it compares shares of a whole micro-batch, padding included, so it changes with
    the layout.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        weights = [getattr(part, name) for name in COEFFICIENTS if hasattr(part, name)]
        if getattr(part, "output_router_logits", False) and (any(weights) or not weights):
            return True
    return False


def refuse_router_loss(config: PreTrainedConfig) -> None:
    """Raises ModelError for a router loss: to leave it out without a word would train another model than the user wants."""
    if has_router_loss(config):
        raise ModelError(
            "adds a router loss, which compares whole micro-batches and so depends on their layout",
            key="model.config.output_router_logits",
            value=True,
            fix="set it to False, in the config or on the model (`model.config.output_router_logits = False`)",
        )
