"""TRL's SFTTrainer on images: its processor and collator stay, and the language model runs without padding."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from trl import SFTConfig, SFTTrainer

import packtrain
from results.unpad.vision import BEGIN, END, IMAGE, MODELS, VIDEO
from tests.plugin.helpers import COMMON
from tests.plugin.test_unpadded import apart, leaking, trained

QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": BEGIN, "<|vision_end|>": END}
SPECIAL = {"llava": {"<image>": IMAGE}, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN}
PICTURE = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %} PICTURE "
    "{% else %} {{ part['text'] }} {% endif %}{% endfor %} </s>{% endfor %}"
)
ROWS = 22
needs_pil = pytest.mark.skipif(
    not hasattr(transformers, "CLIPImageProcessorPil"),
    reason="this transformers resizes images with torchvision only",
)


def of_images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Takes a processor of Qwen's without its part for videos, which needs torchvision; images are resized by PIL."""

    class OfImagesOnly(kind):
        def __init__(self, image_processor, tokenizer, chat_template=None):  # its parameters name its parts
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return OfImagesOnly


def processor(family: str) -> ProcessorMixin:
    """Makes the family's own, which needs no torchvision for images, for words that are a token each."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | SPECIAL[family]
    words = {f"w{number}": number for number in range(4, IMAGE)} | special
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    more = list(SPECIAL[family])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, additional_special_tokens=more)
    template = TEMPLATE.replace("PICTURE", PICTURE[family])
    if family == "llava":
        sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(**sizes),
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
            chat_template=template,
        )
    kind = {"qwen2_5_vl": transformers.Qwen2_5_VLProcessor, "qwen3_vl": transformers.Qwen3VLProcessor}[family]
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )
    return of_images_only(kind)(images, tokenizer, chat_template=template)


def conversations() -> datasets.Dataset:
    """Prompts, every other one with an image, and completions of very different lengths."""
    draw = np.random.default_rng(0)

    def said(role: str, longest: int) -> list[dict]:
        words = (f"w{draw.integers(4, 110)}" for _ in range(draw.integers(1, longest)))
        return [{"role": role, "content": " ".join(words)}]

    def row(number: int) -> dict:
        pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        images = [Image.fromarray(pixels)] if number % 2 else []
        return {"images": images, "prompt": said("user", 25), "completion": said("assistant", 12)}

    return datasets.Dataset.from_list([row(number) for number in range(ROWS)])


@pytest.mark.slow
@needs_pil
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.ci] if family == "qwen3_vl" else []) for family in MODELS]
)
def test_sft_trainer_on_images_takes_the_same_steps(tmp_path, caplog, family):
    def trainer() -> SFTTrainer:
        torch.manual_seed(0)
        args = SFTConfig(
            output_dir=str(tmp_path),
            **COMMON | dict(max_length=None, max_steps=4, bf16=False, gradient_checkpointing=False),
        )
        return SFTTrainer(
            MODELS[family](), args=args, train_dataset=conversations(), processing_class=processor(family)
        )

    untouched = trainer()
    names = [name for name, _ in untouched.model.named_parameters()]
    started = [weight.detach().clone() for weight in untouched.model.parameters()]
    before, weights = trained(untouched)
    of_pictures = [not torch.equal(*pair) for name, *pair in zip(names, started, weights, strict=True) if "vis" in name]
    assert sum(of_pictures) > len(of_pictures) / 2  # images were there
    ours, our_weights = trained(packtrain.attach(trainer()))
    assert "the layers of model.model.language_model run without padding" in caplog.text
    assert len(before[0]) == 4 and apart(before, ours) < 2e-5
    for mine, theirs in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)
    assert apart(before, trained(leaking(packtrain.attach(trainer())))[0]) > 3e-4  # control
