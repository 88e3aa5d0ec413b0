"""Vision-language models: images in some rows only, and the gradients of the vision tower."""

from __future__ import annotations

import pytest
import torch
import transformers

from packtrain.modeling.audit.models import enlarge
from packtrain.modeling.unpad import unpad
from tests.modeling.unpad.helpers import EXACT, Leak, apart, difference, flat_calls, given

IMAGE, BEGIN, END, PATCH = 120, 122, 123, 3 * 2 * 4 * 4  # token ids, and numbers of a patch: colours, frames, pixels
TEXT = {
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
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 121,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}


def rope(*sections):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


def qwen2_5_vl():
    vision = VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | rope(1, 1, 2), vision_config=vision, **TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = TEXT | rope(2, 1, 1) | {"head_dim": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


@pytest.fixture(params=[qwen2_5_vl, qwen3_vl], ids=["qwen2.5-vl", "qwen3-vl"])
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = request.param()
        enlarge(made)
    return made.eval()


def pictures(left: bool) -> dict[str, torch.Tensor]:
    """Three rows of 30, 12 and 20 tokens; an image of 4 tokens in the first, one of 8 in the last."""
    generator, lengths, width = torch.Generator().manual_seed(0), (30, 12, 20), 30
    ids = torch.zeros(3, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (length, image) in enumerate(zip(lengths, (4, 0, 8), strict=True)):
        text = torch.randint(5, 110, (length,), generator=generator)
        if image:
            text[3 : 5 + image] = torch.tensor([BEGIN, *[IMAGE] * image, END])
        columns = slice(width - length, width) if left else slice(0, length)
        ids[row, columns], mask[row, columns] = text, 1
    labels = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
    labels[torch.arange(3), mask.argmax(1)] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(4 * 4 + 4 * 8, PATCH, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def tower(found: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [part.flatten() for name, part in found.items() if name.startswith("gradient model.visual")]
    assert len(parts) > 10
    return torch.cat(parts).double()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_images_in_some_rows(model, left):
    batch = pictures(left)
    padded = given(model, batch)
    with unpad(model) as unpadding:
        assert unpadding.modules == ["model.language_model"]
        assert flat_calls(model, "model.language_model", batch) == 1
        flat = given(model, batch)
        assert apart(padded, flat) <= EXACT
        assert abs(torch.cosine_similarity(tower(padded), tower(flat), dim=0) - 1) <= 1e-6
        leak = model.model.language_model.register_forward_pre_hook(Leak(), with_kwargs=True)
        leaking = given(model, batch)
        leak.remove()
    assert apart(padded, leaking) > 1e-2
    assert torch.cosine_similarity(tower(padded), tower(leaking), dim=0) < 0.999


def test_text_without_images(model):
    batch = {name: pictures(False)[name] for name in ("input_ids", "attention_mask", "labels")}
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] < IMAGE, 7)
    assert difference(model, batch) <= EXACT
