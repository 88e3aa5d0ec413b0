"""The audit finds by itself who leaks: known-good and known-leaking architectures, pinned."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.audit import LARGE, MODES, audit_model, quick_check, router_losses
from packtrain.modeling.audit.causes import mask_builders, recurrent_layers
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.report import Finding
from packtrain.modeling.audit.subject import Subject

QUICK = {"modes": ("eval",), "padding": False}
EARLIER = [(i, j) for i in range(4) for j in range(i)]
OTHERS = [(i, j) for i in range(4) for j in range(4) if i != j]


def examine(architecture: str, implementation: str, layout: str = "flat", mode: str = "eval", **fields) -> Finding:
    model = tiny_model(architecture, **fields)
    options = {"implementations": [implementation], "layouts": [layout], "modes": [mode], "padding": False}
    return audit_model(model, **options).findings[0]


# ------------------------------------------------------------------------------------------------ known cases


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "olmo2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", NAME])
def test_known_to_isolate_without_mask_and_cache(architecture, implementation):
    finding = examine(architecture, implementation, "positions")
    assert finding.verdict == "isolated" and finding.safe and finding.cause is None
    assert finding.difference < 1e-5 and finding.leak < 1e-5 and finding.sees == []
    assert finding.calls == (tiny_model(architecture).config.num_hidden_layers if implementation == NAME else None)


@pytest.mark.parametrize(
    "architecture, implementation, layout, mode, sees, cause",
    [
        ("llama", "sdpa", "flat", "cache", EARLIER, "the cache is on"),
        ("llama", "eager", "flat", "cache", EARLIER, "the cache is on"),
        ("llama", "sdpa", "masked", "eval", EARLIER, "there is an attention mask"),
        ("gpt_oss", "eager", "positions", "eval", EARLIER, "without position_ids"),
        ("opt", "sdpa", "positions", "eval", EARLIER, "without position_ids"),
        ("bloom", "eager", "flat", "eval", EARLIER, "without position_ids"),
        ("falcon", "sdpa", "flat", "eval", EARLIER, "without position_ids"),
        ("bert", "sdpa", "flat", "eval", OTHERS, "bidirectional"),
        ("modernbert", "sdpa", "positions", "eval", OTHERS, "bidirectional"),
        ("mamba", "eager", "flat", "eval", EARLIER, "MambaMixer"),
        ("mamba", NAME, "flat", "eval", EARLIER, "MambaMixer"),
        ("recurrent_gemma", NAME, "flat", "eval", EARLIER, "Recurrent"),
        ("llama", "sdpa", "flat", "prompt tuning", EARLIER, "virtual tokens"),
    ],
)
def test_known_to_leak(architecture, implementation, layout, mode, sees, cause):
    both = {"layouts": list(dict.fromkeys(["flat", layout])), "modes": list(dict.fromkeys(["eval", mode]))}
    report = audit_model(tiny_model(architecture), implementations=[implementation], padding=False, **both)
    finding = report.find(implementation, layout, mode)
    assert finding.verdict == "leaks" and finding.leak > 0.05
    assert set(finding.sees) <= set(sees) and (3, 2) in finding.sees and (1, 0) in finding.sees
    assert cause in finding.cause


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "albert", "distilbert", "electra", "modernbert", "gpt_oss"]
)
def test_packtrain_varlen_repairs(architecture):
    own = tiny_model(architecture).config._attn_implementation
    assert examine(architecture, own).verdict == "leaks"
    repaired = examine(architecture, NAME, mode="train")
    assert repaired.verdict == "isolated" and repaired.difference < 1e-5
    assert repaired.gradient_difference < 1e-5
    assert repaired.calls > 0


def test_packtrain_varlen_repairs_a_decoder_too():
    assert examine("gpt_oss", NAME, "positions", "train").verdict == "isolated"  # with its sinks and windows


def test_calls_tell_who_has_attention_of_its_own():
    assert examine("mamba", NAME).calls == 0
    refused = examine("bloom", NAME)
    assert refused.verdict == "not supported" and "by name" in refused.error
    assert examine("falcon", NAME).verdict == "not supported"


def test_padded_batches_are_isolated_on_either():
    for implementation in ("sdpa", "eager", NAME):
        assert examine("llama", implementation, "padded").verdict == "isolated"


def test_all_modes_of_one_model():
    report = audit_model(tiny_model("llama"), implementations=[NAME, "sdpa"], layouts=["flat"])
    assert {f.mode for f in report.findings} == set(MODES)
    verdicts = {(f.implementation, f.mode): f.verdict for f in report.findings}
    for mode in ("eval", "train", "checkpointing", "lora"):
        assert verdicts[NAME, mode] == verdicts["sdpa", mode] == "isolated"
    assert verdicts[NAME, "cache"] == "isolated" and verdicts["sdpa", "cache"] == "leaks"
    assert verdicts[NAME, "prompt tuning"] == "not supported"  # offsets don't fit a row with virtual tokens
    assert verdicts["sdpa", "prompt tuning"] == "leaks"
    for finding in report.findings:
        trained = finding.mode not in ("eval", "cache") and finding.verdict != "not supported"
        assert (finding.gradient_difference is not None) == trained
    text = "\n".join(report.lines())
    assert "calls the registered attention 2 times per pass" in text
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["eval", "train", "checkpointing", "cache", "lora", "prompt tuning"] in rows
    assert [NAME, "flat", *["ok"] * 5, "refused [1]"] in rows
    assert next(row for row in rows if row[:2] == ["sdpa", "flat"])[5] == "leaks 2.4 [2]"
    assert "[2] leaks (document 0 into 1, document 0 into 2, document 1 into 2, 3 more); the cache is on" in text
    assert f"flat batches are safe with {NAME} (attn_implementation: auto)" in text
    assert "keep use_cache=False (a cache leaks with sdpa)" in text


# ----------------------------------------------------------------------------------------- how it can tell


def test_wrong_is_not_leaking():
    """Documents that don't see each other and yet are not what they are alone: positions that are not reset."""
    model = tiny_model("gpt2")

    def running_on(documents, start, pad):
        laid = probe.flat(documents, start, pad)
        total = laid.batch["input_ids"].shape[1]
        return replace(laid, batch=laid.batch | {"position_ids": torch.arange(total)[None]})

    probe.LAYOUTS["running on"] = running_on
    try:
        finding = audit_model(model, implementations=[NAME], layouts=["running on"], **QUICK).findings[0]
    finally:
        del probe.LAYOUTS["running on"]
    assert finding.verdict == "wrong" and finding.leak < 1e-5 < 0.05 < finding.difference


def test_a_model_without_context_is_unclear():
    """Where outputs don't depend on other tokens at all, no leak could show: that must not pass for isolation."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    finding = quick_check(model, "flat")
    assert finding.verdict == "unclear" and not finding.safe


def test_who_sees_whom_literally():
    """A model that adds up the row: everybody sees everybody before. Two rows: only the neighbour."""
    matrix_of = {}
    for layout in ("flat", "rows"):
        finding = examine("mamba", "eager", layout)
        matrix_of[layout] = finding.sees
    assert matrix_of["flat"] == EARLIER
    assert matrix_of["rows"] == [(1, 0), (3, 2)]


def test_documents_have_no_special_tokens_and_changes_change_every_token():
    model = tiny_model("llama", bos_token_id=7, eos_token_id=9, pad_token_id=11)
    documents = probe.sample_documents(model)
    assert [len(document) for document in documents] == list(probe.LENGTHS)
    assert not {7, 9, 11} & set(torch.cat(documents).tolist())
    changed = probe.change(documents, 2)
    assert (changed[2] != documents[2]).all()
    assert all(changed[i] is documents[i] for i in (0, 1, 3))


def test_layouts_literally():
    a, b, c, d = (torch.arange(10 * n, 10 * n + length) for n, length in enumerate((2, 1, 1, 2), start=1))
    flat = probe.flat([a, b, c, d], 2, 0)
    assert flat.batch["input_ids"].tolist() == [[10, 11, 20, 30, 40, 41]]
    assert flat.batch["position_ids"].tolist() == [[2, 3, 2, 2, 2, 3]]
    assert flat.batch["cu_seq_lens_q"].tolist() == [0, 2, 3, 4, 6]
    assert flat.batch["seq_idx"].tolist() == [[0, 0, 1, 2, 3, 3]]
    assert flat.places == [(0, 0, 2), (0, 2, 3), (0, 3, 4), (0, 4, 6)]
    rows = probe.rows([a, b, c, d], 0, 0)
    assert rows.batch["input_ids"].tolist() == [[10, 11, 20], [30, 40, 41]]
    assert rows.batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert rows.places == [(0, 0, 2), (0, 2, 3), (1, 0, 1), (1, 1, 3)]
    padded = probe.padded([a, b], 0, 9, left=True, extra=1)
    assert padded.batch["input_ids"].tolist() == [[9, 10, 11], [9, 9, 20]]
    assert padded.batch["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert padded.places == [(0, 1, 3), (1, 2, 3)]


def test_causes_are_read_off_the_source():
    assert all(positions for _, positions in mask_builders(type(tiny_model("llama"))))
    assert all(positions for _, positions in mask_builders(type(tiny_model("gemma3_text"))))
    assert not any(positions for _, positions in mask_builders(type(tiny_model("gpt_oss"))))
    assert any("bidirectional" in name for name, _ in mask_builders(type(tiny_model("bert"))))
    assert recurrent_layers(tiny_model("mamba")) == ["MambaMixer"]
    assert recurrent_layers(tiny_model("gpt_oss")) == recurrent_layers(tiny_model("gpt2")) == []


# -------------------------------------------------------------------------------------------------- filler


def test_filler_reaches_real_tokens_only_without_a_mask_and_both_ways():
    def reaching(architecture: str) -> set[str]:
        report = audit_model(tiny_model(architecture), implementations=["sdpa"], layouts=["padded"], modes=["eval"])
        assert {effect.side for effect in report.padding} == {"right", "left", "tail"}
        return {effect.side for effect in report.padding if effect.reaches}

    assert reaching("llama") == set()
    assert reaching("bert") == {"tail"}  # what diffusion language models train: the tail belongs to the example


def test_router_losses_that_count_filler_are_told():
    """Mixtral hands its mask to the router's loss; without the mask, filler counts."""
    model = tiny_model("mixtral")
    documents = probe.sample_documents(model)
    with_mask = router_losses(model, documents, 0, 0)
    assert with_mask[0] == pytest.approx(with_mask[1], rel=1e-5)
    assert router_losses(tiny_model("llama"), documents, 0, 0) is None


# --------------------------------------------------------------------------------------------- the quick check


def test_quick_check_refuses_a_leak_unless_allowed(caplog):
    model = tiny_model("bert")
    finding = quick_check(model, "flat")
    assert finding.verdict == "leaks" and "bidirectional" in finding.cause
    with pytest.raises(ModelError, match="document 1 into 0") as raised:
        finding.refuse()
    assert "allow_contamination: true" in raised.value.fix
    with caplog.at_level(logging.WARNING):
        finding.refuse(allow_contamination=True)
    assert "attention leaks between documents" in caplog.text
    register()
    model.set_attn_implementation(NAME)
    quick_check(model, "flat").refuse()
    quick_check(model, "padded").refuse()


def test_quick_check_of_a_model_that_cannot_use_what_it_was_loaded_with():
    """transformers loads bloom with any registered name, and then adds our masks to its scores as numbers."""
    register()
    built = tiny_model("bloom")
    model = type(built)._from_config(built.config, attn_implementation=NAME)
    model.load_state_dict(built.state_dict())
    with pytest.raises(ModelError, match="attention leaks between documents"):
        quick_check(model, "flat").refuse()


def test_quick_check_in_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    assert quick_check(model, "flat").verdict == "isolated"
    assert quick_check(tiny_model("bert").to(torch.bfloat16), "flat").verdict == "leaks"


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_quick_check_computes_in_what_training_computes_in(compute_dtype):
    model, expected, seen = tiny_model("llama"), compute_dtype or torch.float32, set()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    finding = quick_check(model, "flat", NAME, compute_dtype=compute_dtype)
    assert finding.verdict == "isolated" and seen == {expected}
    subject = Subject.of(model, compute_dtype)
    assert subject.tolerance == probe.PRECISION[expected] * subject.scale
    assert quick_check(tiny_model("bert"), "flat", compute_dtype=compute_dtype).verdict == "leaks"
    if not torch.cuda.is_available():
        refusal = quick_check(model, "flat", "flash_attention_2", compute_dtype=compute_dtype)
        assert f"this run is on cpu in {expected}" in refusal.error
    assert not torch.is_autocast_enabled("cpu")


def test_a_large_model_is_checked_by_its_first_layers(monkeypatch):
    """As many as show every kind of layer; the model is whole again afterwards."""
    monkeypatch.setattr("packtrain.modeling.audit.audit.LARGE", 1000)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", num_hidden_layers=5, layer_types=kinds)
    layers = list(model.model.layers)
    finding = quick_check(model, "flat", NAME)
    assert finding.checked == "first 3 of 5 layers" and finding.calls == 3
    assert finding.verdict == "isolated" and "first 3 of 5 layers" in finding.what()
    assert list(model.model.layers) == layers
    assert quick_check(tiny_model("bert", num_hidden_layers=4), "flat").checked == "first 2 of 4 layers"
    assert LARGE > 10_000_000


def test_nothing_of_the_model_or_the_world_is_changed():
    model = tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1).train()
    model.transformer.h[0].eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    audit_model(model, layouts=["flat"])
    quick_check(model, "padded")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa" and not model.is_gradient_checkpointing
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == rates and 0.3 in rates
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_what_this_machine_lacks_is_one_line_and_a_misspelt_name_an_error():
    report = audit_model(tiny_model("llama"), layouts=["flat"], **QUICK)
    text = "\n".join(report.lines())
    assert report.find("sdpa", "flat").safe and "ok: within" in text
    if not torch.cuda.is_available():
        assert "flash_attention_2, flash_attention_3, flash_attention_4: not supported: needs CUDA" in text
        assert "flex_attention: not supported: has no backward pass on CPU" in text
    with pytest.raises(ModelError, match="did you mean sdpa"):
        audit_model(tiny_model("llama"), implementations=["sdpaa"], **QUICK)
    assert repr(report) == str(report) == text  # and not the fields of some hundred findings


@pytest.mark.parametrize("given", [{"layouts": ["fla"]}, {"layouts": "flat"}, {"modes": ["x"]}, {"modes": []}])
def test_layouts_and_modes_that_do_not_exist_are_refused(given):
    """A report that says `refused` of a layout, or says nothing at all, was taken for that of the model."""
    (key,) = given
    with pytest.raises(ModelError, match=f"{key}: must be a list of some of these names") as refused:
        audit_model(tiny_model("llama"), **given)
    assert "choose from " in refused.value.fix
    with pytest.raises(ModelError, match="implementations: must be a list of names"):
        audit_model(tiny_model("llama"), implementations="sdpa")


def test_an_encoder_with_prompt_tuning():
    report = audit_model(tiny_model("bert"), implementations=["sdpa"], layouts=["padded"], padding=False)
    assert report.find("sdpa", "padded", "prompt tuning").safe


def test_a_model_that_cannot_run_says_so():
    model = tiny_model("llama")
    model.model.norm = nn.LayerNorm(7)
    with pytest.raises(ModelError, match="cannot run a single document"):
        quick_check(model, "flat")


# ---------------------------------------------------------------------------------------------- tiny models


@pytest.mark.parametrize(
    "architecture",
    ["llama", "bert", "roberta", "gemma4_text", "gpt_oss", "deepseek_v3", "jamba", "bamba", "qwen3_next", "mamba2"],
)
def test_tiny_models_of_every_kind(architecture):
    state = torch.get_rng_state()
    model, again = tiny_model(architecture), tiny_model(architecture)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    kinds = getattr(model.config, "layer_types", None) or ["all alike"]
    assert model.config.num_hidden_layers >= len(set(kinds))
    with torch.no_grad():
        assert model(input_ids=torch.arange(10, 19)[None])[0].isfinite().all()


def test_tiny_models_that_cannot_be():
    with pytest.raises(ModelError, match="did you mean.*llama"):
        tiny_model("lama")
    with pytest.raises(ModelError, match="tiny model .* cannot be built"):
        tiny_model("llama", hidden_size="many")
