"""Models, tokenizers and adapters: what is loaded, and what is refused with which advice."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.loading import add_lora, count_parameters, load_config, load_model
from packtrain.modeling.tokenizer import load_tokenizer
from packtrain.recipe.sections import ModelSection

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


FROM_SCRATCH = ModelSection(config=LLAMA)


def scratch(tokenizer, *, attn_implementation: str = "sdpa", **section) -> PreTrainedModel:
    """A new model of a recipe's `model:` section."""
    model = ModelSection(**{"config": LLAMA} | section)
    return load_model(model, load_config(model, tokenizer=tokenizer), attn_implementation=attn_implementation)


def pretrained(directory, *, attn_implementation: str = "sdpa") -> PreTrainedModel:
    model = ModelSection(model_name_or_path=str(directory))
    return load_model(model, load_config(model), attn_implementation=attn_implementation)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection(tokenizer_vocab_size=300), corpus=["seven times six is forty-two " * 5])


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A directory with a tiny model and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    scratch(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# ----------------------------------------------------------------------------------------------- from scratch


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(tokenizer):
    config = load_config(FROM_SCRATCH, tokenizer=tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    given = load_config(ModelSection(config=LLAMA | {"vocab_size": 512, "eos_token_id": 7}), tokenizer=tokenizer)
    assert (given.vocab_size, given.eos_token_id) == (512, 7)


def test_same_seed_same_weights(tokenizer):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = scratch(tokenizer)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_model_is_ready_to_train(tokenizer):
    model = scratch(tokenizer, attn_implementation=NAME, dtype="bfloat16")
    assert model.config._attn_implementation == NAME
    assert model.dtype == torch.bfloat16


GEMMA3 = {"model_type": "gemma3", "text_config": {"hiden_size": 8}}


@pytest.mark.parametrize(
    ("config", "key", "parts"),
    [
        (
            LLAMA | {"hiden_size": 32},
            "model.config.hiden_size",
            ["not a field of LlamaConfig", "mean hidden_size?"],
        ),
        (
            GEMMA3,
            "model.config.text_config.hiden_size",
            ["not a field of Gemma3TextConfig", "mean hidden_size?"],
        ),
        (LLAMA | {"model_type": "lama"}, "model.config.model_type", ["not an architecture", "mean llama?"]),
        ({"model_type": "t5"}, "model.config", ["t5 is not a causal language model"]),
        (
            LLAMA | {"num_attention_heads": 3},
            "model.config",
            ["not a multiple of the number of attention heads"],
        ),
        (LLAMA | {"hidden_size": "big"}, "model.config", ["expected int, got str"]),
        (LLAMA | {"attention_dropout": 7}, "model.config.attention_dropout", ["must be a probability", "from 0 to 1"]),
        (LLAMA | {"vocab_size": 100}, "model.config.vocab_size", ["only 100", "a larger `vocab_size`"]),
    ],
)
def test_bad_configs_say_why(tokenizer, config, key, parts):
    with pytest.raises(ModelError) as caught:
        scratch(tokenizer, config=config)
    assert caught.value.key == key
    for part in parts:
        assert part in str(caught.value)


def test_older_names_that_transformers_translates_pass(tokenizer):
    config = load_config(ModelSection(config=LLAMA | {"rope_theta": 5000.0}), tokenizer=tokenizer)
    assert config.rope_parameters["rope_theta"] == 5000.0


# ------------------------------------------------------------------------------------------------- pretrained


def test_pretrained_weights_are_the_saved_ones(saved):
    section = ModelSection(model_name_or_path=str(saved))
    config = load_config(section, tokenizer=load_tokenizer(section))
    model = load_model(section, config, attn_implementation=NAME)
    stored = load_file(saved / "model.safetensors")
    assert stored and all(torch.equal(dict(model.named_parameters())[name], stored[name]) for name in stored)
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("damage", ["missing", "other shape"])
def test_incomplete_checkpoints_are_refused(saved, tmp_path, damage):
    """transformers draws the lacking weights at random and trains on."""
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    weights = load_file(saved / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    weight = weights.pop(name)
    if damage == "other shape":
        weights[name] = weight[:3].clone()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 weights of the model, such as {name}"):
        pretrained(broken)


def test_a_tokenizer_larger_than_the_model_is_refused(saved):
    corpus = [chr(65 + i % 26) * (2 + i // 26) for i in range(2000)]
    larger = load_tokenizer(ModelSection(tokenizer_vocab_size=600), corpus=corpus)
    assert len(larger) == 600
    with pytest.raises(ModelError, match="the tokenizer has .* the model only"):
        load_config(ModelSection(model_name_or_path=str(saved)), tokenizer=larger)


def test_a_missing_attention_package_says_auto(saved):
    with pytest.raises(ModelError, match="attn_implementation: auto"):
        pretrained(saved, attn_implementation="flash_attention_2")


class _Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does about repositories that can't be read."""

    answers = {
        "gated": (403, "GatedRepo"),
        "missing": (404, "RepoNotFound"),
        "revision": (404, "RevisionNotFound"),
    }

    def do_HEAD(self):
        status, code = self.answers[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


ASKS = """
import sys
from packtrain.errors import ModelError
from packtrain.modeling.loading import load_config
from packtrain.modeling.tokenizer import load_tokenizer
from packtrain.recipe.sections import ModelSection
for name in sys.argv[1:]:
    for load in (load_tokenizer, load_config):
        try:
            load(ModelSection(model_name_or_path=name, revision="v9"))
        except ModelError as error:
            print(name, "|", error.key, "|", error.what, "|", error.fix)
"""


@pytest.mark.slow
def test_hub_errors_say_what_to_do(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin", "HF_HUB_DISABLE_TELEMETRY": "1"}
    names = ["org/gated", "org/missing", "org/revision"]
    try:
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        answered = _ask(names, quiet | endpoint)
    finally:
        server.shutdown()
    offline = _ask(["org/model"], quiet | {"HF_HUB_OFFLINE": "1"})

    expected = {
        "org/gated": ("is gated", "accept its terms at https://huggingface.co/org/gated"),
        "org/missing": ("neither a directory here nor a model on the Hub", "check the spelling"),
        "org/revision": ("has no revision 'v9'", "org/revision/commits/main"),
        "org/model": ("is not in the local cache, and the Hub can't be reached", "recipes/quickstart.yaml"),
    }
    lines = answered + offline
    assert len(lines) == 2 * len(expected)
    for line in lines:
        name, key, what, fix = line.split(" | ")
        assert key in ("model.tokenizer_name_or_path", "model.model_name_or_path")
        assert expected[name][0] in what and expected[name][1] in fix


def _ask(names: list[str], env: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", ASKS, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ----------------------------------------------------------------------------------------------------- filler


def _tokenizer_with(*tokens: str, **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "special", "expected"),
    [
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], {}, "<|finetune_right_pad_id|>"),
        (["[PAD]"], {"unk_token": "<unk>"}, "[PAD]"),
        (["<unused0>", "<unused1>"], {"unk_token": "<unk>"}, "<unused0>"),
        (["<|notepad|>"], {"unk_token": "<unk>"}, "<unk>"),  # not made for padding
        ([], {"unk_token": "<unk>"}, "<unk>"),
        ([], {}, "</s>"),
        (["<|fim_pad|>"], {"pad_token": "</s>"}, "</s>"),  # the tokenizer's own choice stays
    ],
)
def test_filler_is_the_token_that_text_needs_least(tmp_path, caplog, tokens, special, expected):
    _tokenizer_with(*tokens, **special).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSection(tokenizer_name_or_path=str(tmp_path)))
    assert tokenizer.pad_token == expected
    said = f"{expected} is used for padding" in caplog.text
    assert said == ("pad_token" not in special)


def test_a_chat_template_is_read_from_its_file(saved, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(ModelSection(tokenizer_name_or_path=str(saved), chat_template=str(path)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(ModelError, match="model.chat_template"):
        absent = str(tmp_path / "absent.jinja")
        load_tokenizer(ModelSection(tokenizer_name_or_path=str(saved), chat_template=absent))


# ------------------------------------------------------------------------------------------------------- LoRA


def test_only_the_adapter_trains(saved):
    model = pretrained(saved)
    whole = count_parameters(model)
    adapted = add_lora(model, {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    # A [2, 16] and B [16, 2] for q and v of 2 layers; 2 heads of 8, so all projections are 16 x 16
    assert count_parameters(adapted) == (2 * 2 * (2 * 16 + 16 * 2), whole[0])
    assert whole[1] == 0
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_all_linear_leaves_the_head_alone(saved):
    adapted = add_lora(pretrained(saved), {"r": 2, "target_modules": "all-linear"})
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_gradients_pass_frozen_embeddings_only_when_asked(saved):
    ids = torch.tensor([[1, 2, 3]])
    asked = add_lora(pretrained(saved), {"target_modules": "all-linear"}, gradient_checkpointing=True)
    plain = add_lora(pretrained(saved), {"target_modules": "all-linear"})
    assert asked.get_input_embeddings()(ids).requires_grad
    assert not plain.get_input_embeddings()(ids).requires_grad


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({"target_modules": ["q_prj"]}, ["q_prj", "all-linear or a list of some of", "q_proj"]),
        ({"r": 0, "target_modules": "all-linear"}, ["positive"]),
        ({"init_lora_weights": "gausian", "target_modules": "all-linear"}, ["gausian"]),
    ],
)
def test_bad_adapters_say_why(saved, lora, parts):
    with pytest.raises(ModelError) as caught:
        add_lora(pretrained(saved), lora)
    for part in parts:
        assert part in str(caught.value)
