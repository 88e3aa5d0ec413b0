"""Vision-language models: images in some rows only, and the gradients of the vision tower."""

from __future__ import annotations

import pytest
import torch

from packtrain.modeling.audit.models import enlarge
from packtrain.modeling.unpad import unpad
from results.unpad.vision import BEGIN, END, IMAGE, PATCH, Pictures, llava, qwen2_5_vl, qwen3_vl
from tests.modeling.unpad.helpers import EXACT, Leak, apart, difference, flat_calls, given


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


def test_images_of_another_tower():
    """LLaVA's, whose vision tower is a model of transformers itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = llava().eval()
        enlarge(model)
    rows = [[1, 7, 8, 9, 2], [1, BEGIN, *[IMAGE] * 16, END, 30, 2], [5, BEGIN, *[IMAGE] * 16, END, *range(20, 40)]]
    batch = Pictures("llava")([{"input_ids": ids, "image": number - 1} for number, ids in enumerate(rows)])
    batch["labels"][:, 0] = -100
    padded = given(model, batch)
    with unpad(model) as unpadding:
        assert unpadding.modules == ["model.language_model"]
        assert flat_calls(model, "model.language_model", batch) == 1
        flat = given(model, batch)
        assert apart(padded, flat) <= EXACT
        one, other = (
            torch.cat([part.flatten() for name, part in found.items() if "gradient model.vision_tower" in name])
            for found in (padded, flat)
        )
        assert abs(torch.cosine_similarity(one.double(), other.double(), dim=0) - 1) <= 1e-6
        model.model.language_model.register_forward_pre_hook(Leak(), with_kwargs=True)
        assert apart(padded, given(model, batch)) > 1e-2


def test_text_without_images(model):
    batch = {name: pictures(False)[name] for name in ("input_ids", "attention_mask", "labels")}
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] < IMAGE, 7)
    assert difference(model, batch) <= EXACT
