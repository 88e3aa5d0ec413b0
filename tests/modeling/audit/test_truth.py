"""The audit is not fooled: by heads and adapters of zeros, tiny vocabularies, or the way a model is named."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from packtrain.cli.audit import show_audit
from packtrain.errors import ModelError, PacktrainError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.audit import quick_check
from packtrain.modeling.audit.causality import check_causal, sees_ahead
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.isolation import check_isolation
from packtrain.plugin.attach import attach
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build
from tests.plugin.helpers import pad
from tests.tiny import random_documents

CPU = torch.device("cpu")


@pytest.mark.parametrize(("architecture", "verdict"), [("opt", "leaks"), ("llama", "isolated")])
def test_a_head_of_zeros_hides_nothing(architecture, verdict):
    model = tiny_model(architecture, tie_word_embeddings=False)
    nn.init.zeros_(model.get_output_embeddings().weight)
    assert quick_check(model, "flat").verdict == verdict


class LeakingLinear(nn.Linear):
    """A projection whose outputs come from the token before, whatever document that is of."""

    def forward(self, x):
        return super().forward(x.roll(1, dims=1))


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2, target_modules=["v_proj"]), LoHaConfig(r=2, target_modules=["q_proj"])]
)
def test_a_leak_through_an_adapter_that_begins_at_zero(config):
    model = get_peft_model(tiny_model("llama"), config)
    assert quick_check(model, "flat", NAME).safe  # control
    for module in model.modules():
        for name, inner in list(module.named_children()):
            if name == "default" and isinstance(inner, nn.Linear) and inner.out_features == 2:
                leaking = LeakingLinear(inner.in_features, 2, bias=False)
                module._modules[name] = leaking
    if isinstance(config, LoHaConfig):  # no module of its own to spoil: the zero matrix is drawn all the same
        from packtrain.modeling.equality import nonzero_adapters

        zeros = [weight for name, weight in model.named_parameters() if "hada_" in name and not weight.detach().any()]
        with nonzero_adapters(model):
            assert zeros and all(weight.any() for weight in zeros)
        assert not any(weight.any() for weight in zeros)
        return
    assert quick_check(model, "flat", NAME).verdict == "leaks"


def test_adapters_without_zeros_are_left_alone():
    model = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert quick_check(model, "flat", NAME).safe


# ------------------------------------------------------------------------------------- the same by any name


def audited(target: object, layouts: list[str] | None, implementations: list[str] | None = None) -> tuple[bool, str]:
    printed = StringIO()
    console = Console(file=printed, width=200)
    safe = show_audit(str(target), console, implementations=implementations, layouts=layouts, device="cpu")
    return safe, printed.getvalue()


@pytest.mark.parametrize("architecture", ["llama", "bert", "opt", "lfm2"])
def test_the_same_answer_by_name_by_config_and_by_directory(architecture, tmp_path):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    fields = {
        name: value for name, value in model.config.to_diff_dict().items() if name not in LEFT_OUT and "eps" not in name
    }
    answers = []
    for target in (architecture, f"config: {json.dumps(fields)}", tmp_path):
        safe, text = audited(target, ["flat"], ["sdpa", NAME])
        rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["sdpa"], [NAME])]
        words = [[word for word in row if word.isalpha()] for row in rows]
        answers.append((safe, words, [line for line in text.splitlines() if "flat batches" in line]))
    assert answers[0] == answers[1] == answers[2] and answers[0][1:] != ([], [])


LEFT_OUT = {"architectures", "dtype", "transformers_version", "tokenizer_class"}


@pytest.mark.parametrize("vocabulary", [4, 5, 12])
def test_small_vocabularies(vocabulary):
    shape = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
    _, text = audited(f"config: {{model_type: llama, {shape}, vocab_size: {vocabulary}}}", ["flat"], ["sdpa"])
    assert "flat batches are safe with sdpa" in text


def test_a_padding_token_beyond_the_vocabulary_is_our_error():
    shape = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
    with pytest.raises(PacktrainError, match="[Pp]adding_idx must be within"):
        audited(f"config: {{model_type: phi3, {shape}, vocab_size: 64}}", ["flat"])  # its padding token is 32,000


def test_what_is_named_and_leaks_ends_with_1():
    assert (
        audited("minimax", ["flat"], ["sdpa"])[0] is False and audited("minimax", ["flat"])[0] is True
    )  # padded inside
    assert audited("minimax", ["padded"])[0] is True
    assert (
        audited("opt", ["flat"], ["sdpa"])[0] is False and audited("opt", ["flat"])[0] is True
    )  # packtrain_varlen is safe
    assert audited("opt", None, [NAME])[0] is True


# --------------------------------------------------------------------------------------------- causal or not


def bert(**fields) -> nn.Module:
    config = AutoConfig.for_model(**tiny_model("bert").config.to_diff_dict() | fields)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_sees_its_answers_is_refused():
    with pytest.raises(ModelError, match="model.config.is_decoder: BertLMHeadModel sees the tokens") as raised:
        check_causal(bert(is_decoder=False))
    assert "set it to true" in raised.value.fix
    check_causal(bert(is_decoder=True))
    assert sees_ahead(tiny_model("llama")) is None and sees_ahead(tiny_model("mamba")) is None
    with pytest.raises(ModelError, match="XLNetLMHeadModel sees .*\n.*choose a causal model"):
        check_causal(tiny_model("xlnet"))


RECIPE = """
model: {config: {MODEL}, tokenizer_vocab_size: 300}
data: {path: "packtrain:arithmetic", num_rows: 40, max_length: 512, overflow: truncate}
batching: {strategy: STRATEGY, examples_per_step: 4, max_tokens: 512}
training: {output_dir: OUT, use_cpu: true, max_steps: 1, report_to: none, save_strategy: 'no'}
"""
SHAPE = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"


def built(tmp_path, model: str, strategy: str):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("OUT", str(tmp_path / "out")).replace("STRATEGY", strategy)
    path.write_text(text.replace("{MODEL}", "{" + model + "}"))
    return build(load_recipe(path))


def test_a_recipe_with_a_model_that_sees_its_answers(tmp_path):
    with pytest.raises(ModelError, match="sees the tokens"):
        built(tmp_path, f"model_type: bert, {SHAPE}", "balanced")
    built(tmp_path, f"model_type: bert, {SHAPE}, is_decoder: true", "pad_longest")


def test_mamba_trains_padded(tmp_path):
    trainer = built(tmp_path, "model_type: mamba, hidden_size: 32, num_hidden_layers: 2, state_size: 8", "pad_longest")
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_batch_that_a_model_cannot_run_is_refused_before_the_first_step():
    """LFM2's convolutions raise an error of their own for flat batches without their kernel (older releases leak), and are
    padded inside only where attention tells documents apart."""
    model = tiny_model("lfm2")
    refused = "cannot run a flat batch with sdpa: ValueError|leaks between documents of a flat batch with sdpa"
    with pytest.raises(ModelError, match=refused) as raised:
        check_isolation(model, "flat", CPU)
    assert "pad_longest" in raised.value.fix
    assert "isolated" in check_isolation(model, "padded", CPU).says
    model.set_attn_implementation(NAME)
    assert "padded inside: " in check_isolation(model, "flat", CPU).says


def test_attach_refuses_a_model_that_sees_its_answers(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    rows = Dataset.from_list(random_documents([5, 9, 7, 12]))
    for model in (bert(is_decoder=False), get_peft_model(bert(is_decoder=False), LoraConfig(target_modules=["query"]))):
        with pytest.raises(PacktrainError, match="sees the tokens"):
            attach(Trainer(model, args, train_dataset=rows, data_collator=pad))
    attach(Trainer(bert(is_decoder=True), args, train_dataset=rows, data_collator=pad))
