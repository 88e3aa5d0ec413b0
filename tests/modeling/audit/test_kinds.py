"""A shrunk model has every kind of layer that the architecture has."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from packtrain.errors import ModelError
from packtrain.modeling.audit.audit import quick_check
from packtrain.modeling.audit.kinds import kind_of, kinds_in, shortest_prefix
from packtrain.modeling.audit.models import model_class, tiny_model

ARCHITECTURES = sorted(
    ({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | {*MODEL_FOR_MASKED_LM_MAPPING_NAMES}) & {*CONFIG_MAPPING}
)
NOT_OF_TEXT = re.compile(
    "Pooler|Cross|Vision|Audio|Encoder|MultiModal|MultimodalEmbedder|Embeddings?$|For[A-Z]|UnfoldConv"
)
# what mixes tokens but is not of a decoder's or encoder's usual layers: a fallback for short rows, LSH buckets
LEFT_OUT = {"BigBirdSelfAttention", "BigBirdPegasusBlockSparseAttention", "BigBirdPegasusSelfAttention"}
MIXES = re.compile("Conv|Mixer|Attention|Mamba|DeltaNet|Recurrent|Indexer|Compressor|Rotary|Experts|MoE|Block$")


def test_kinds_of_layers_by_what_they_are_built_of():
    model = tiny_model("jamba")
    kinds = [kind_of(layer) for layer in model.model.layers]
    assert len(set(kinds)) == 3  # Mamba with an MLP, Mamba with experts, attention with an MLP
    assert len({kind_of(layer) for layer in tiny_model("llama").model.layers}) == 1
    without_rope = {kind_of(layer) for layer in tiny_model("smollm3").model.layers}
    assert len(without_rope) == 2  # modules alike, but for a switch
    shared = {kind_of(layer) for layer in tiny_model("gemma3n_text").model.layers}
    assert len(shared) == 6  # sliding and full: with keys of their own, with keys that others use, with those of others


def test_kinds_by_the_lists_of_a_config():
    config = CONFIG_MAPPING["llama"](num_hidden_layers=5)
    assert shortest_prefix(kinds_in(config)) == 1
    config.layer_types = ["a", "a", "b", "b", "b"]
    config.mlp_only_layers = [0]  # numbers of layers
    assert shortest_prefix(kinds_in(config)) == 3
    config.no_rope_layers = [1, 1, 1, 1, 0]  # an entry for every layer
    assert shortest_prefix(kinds_in(config)) == 5


def kinds_of_text_layers(model: nn.Module) -> dict[str, int]:
    """Counts the kinds of layers in every stack of layers."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(len([*layer.modules()]) > 3 for layer in module)
    }
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    return {name: len({kind_of(layer) for layer in stacks[name]}) for name in outer if "vision" not in name}


def missing_kinds(architecture: str, **fields) -> list[str]:
    """Returns what the architecture's default model has and its tiny one lacks."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            config = CONFIG_MAPPING[architecture]()
            whole = kinds_of_text_layers(model_class(config).from_config(config))
        except Exception as error:  # default configurations that cannot be built
            pytest.skip(f"{type(error).__name__}")
    tiny = kinds_of_text_layers(tiny_model(architecture, **fields))
    return [name for name, count in whole.items() if tiny.get(name, 0) < count]


def modules_missing(architecture: str, **fields) -> set[str]:
    """Returns the classes of the model's file that its layers refer to, that mix tokens, and that the tiny model lacks."""
    model = tiny_model(architecture, **fields)
    file = sys.modules[type(model).__module__]
    classes = {node.name: node for node in ast.parse(inspect.getsource(file)).body if isinstance(node, ast.ClassDef)}
    have = {type(module).__name__ for module in model.modules()}
    reached, todo = set(have), [name for name in have if name in classes]
    while todo:
        for node in ast.walk(classes[todo.pop()]):
            found = getattr(node, "id", None)
            if found in classes and found not in reached and issubclass(getattr(file, found), nn.Module):
                reached.add(found)
                todo.append(found)
    bases = {base.__name__ for name in have & {*classes} for base in getattr(file, name).__mro__}
    return {name for name in reached - have - bases - LEFT_OUT if MIXES.search(name) and not NOT_OF_TEXT.search(name)}


@pytest.mark.parametrize("architecture", ["lfm2", "jamba", "flint", "gemma3n_text", "granitemoehybrid"])
def test_a_tiny_model_has_every_kind(architecture):
    assert missing_kinds(architecture) == [] and modules_missing(architecture) == set()


def test_what_is_missing_is_seen():
    attention_only = {"layer_types": ["full_attention", "full_attention"]}
    assert modules_missing("lfm2", **attention_only) == {"Lfm2ShortConv"}
    assert missing_kinds("smollm3", no_rope_layers=[1, 1, 1, 1]) == ["model.layers"]


@pytest.mark.slow
def test_tiny_models_of_all_architectures_have_every_kind():
    """Some default configurations cannot be built, and are compared by the classes of their files alone."""
    lacking = {}
    for architecture in ARCHITECTURES:
        try:
            classes = modules_missing(architecture)
        except ModelError:  # the sweep of results/audit lists those that cannot be built
            continue
        try:
            lacking[architecture] = (missing_kinds(architecture), classes)
        except pytest.skip.Exception:
            lacking[architecture] = ([], classes)
    assert len(lacking) > 200
    assert {name: found for name, found in lacking.items() if any(found)} == {}


def test_the_first_layers_of_a_large_model_have_every_kind(monkeypatch):
    """SmolLM3's layers without rotary positions differ in nothing but a switch."""
    monkeypatch.setattr("packtrain.modeling.audit.audit.LARGE", 1000)
    model = tiny_model("smollm3", num_hidden_layers=6, no_rope_layers=[1, 1, 1, 0, 1, 1], layer_types=None)
    assert quick_check(model, "flat").checked == "first 4 of 6 layers"
