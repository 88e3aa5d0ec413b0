"""TRL's SFTTrainer on images: its processor and collator stay, and the language model runs without padding."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import packtrain
from results.unpad.vision import IMAGE, llava
from tests.plugin.helpers import COMMON
from tests.plugin.test_unpadded import apart, leaking, trained

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %} <image> "
    "{% else %} {{ part['text'] }} {% endif %}{% endfor %} </s>{% endfor %}"
)
ROWS = 22


def processor() -> LlavaProcessor:
    """Makes one whose images need no torchvision, for words that are a token each."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("this transformers resizes images with torchvision only")
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE}
    words = {f"w{number}": number for number in range(4, IMAGE)} | special
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, additional_special_tokens=["<image>"])
    sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        transformers.CLIPImageProcessorPil(**sizes),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


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
@pytest.mark.ci
def test_sft_trainer_on_images_takes_the_same_steps(tmp_path, caplog):
    def trainer() -> SFTTrainer:
        torch.manual_seed(0)
        args = SFTConfig(
            output_dir=str(tmp_path),
            **COMMON | dict(max_length=None, max_steps=4, bf16=False, gradient_checkpointing=False),
        )
        return SFTTrainer(llava(), args=args, train_dataset=conversations(), processing_class=processor())

    before, weights = trained(trainer())
    ours, our_weights = trained(packtrain.attach(trainer()))
    assert "the layers of model.model.language_model run without padding" in caplog.text
    assert len(before[0]) == 4 and apart(before, ours) < 2e-5
    for mine, theirs in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)
    assert apart(before, trained(leaking(packtrain.attach(trainer())))[0]) > 3e-4  # control
