"""Tiny vision-language models, and batches of rows of which some have an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

IMAGE, VIDEO, BEGIN, END = 120, 121, 122, 123  # token ids
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 32,
}
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=BEGIN, vision_end_token_id=END)
PATCH = 3 * 2 * 4 * 4  # numbers of a patch of Qwen's: colours, frames, pixels
PATCHES = 16  # of an image of 16 x 16 pixels


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


def qwen2_5_vl() -> PreTrainedModel:
    vision = VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | rope(1, 1, 2), vision_config=vision, **TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    vision = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = TEXT | rope(2, 1, 1) | {"head_dim": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    text = TEXT | {"model_type": "llama"}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=CLIP, image_token_index=IMAGE, image_seq_length=16
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "llava": llava}


def pictured(family: str, words: Any, settings: Mapping[str, Any]) -> Trainer:
    """Builds transformers' Trainer of a vision-language model; every other row has an image."""

    def row(number: int) -> dict[str, Any]:
        ids = [5 + token % 100 for token in words.ids()]
        if number % 2:
            count = PATCHES if family == "llava" else PATCHES // 4
            ids[1:1] = [BEGIN, *[IMAGE] * count, END]
        return {"input_ids": ids, "image": number if number % 2 else -1}

    torch.manual_seed(0)
    arguments = TrainingArguments(**dict(settings) | {"remove_unused_columns": False})
    return Trainer(MODELS[family](), arguments, train_dataset=words.table(row), data_collator=Pictures(family))


@dataclass(frozen=True)
class Pictures:
    """Collates padded rows, and random pixels for those with an image."""

    family: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [torch.tensor(row["input_ids"]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        labels = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        images = [row["image"] for row in rows if row["image"] >= 0]
        if not images:
            return batch
        if self.family == "llava":
            return batch | {"pixel_values": torch.stack([self._pixels(image, 3, 16, 16) for image in images])}
        return batch | {
            "pixel_values": torch.cat([self._pixels(image, PATCHES, PATCH) for image in images]),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(images)),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }

    def _pixels(self, image: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(image))
