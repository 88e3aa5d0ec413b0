"""`packtrain_varlen` as transformers meets it: when there is a mask, where documents come from, what is
refused, and that whatever is not packed gets bitwise what sdpa gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, masking_utils

from packtrain.errors import ModelError
from packtrain.modeling.attention.documents import bounds_from_cu_seq_lens
from packtrain.modeling.attention.mask import varlen_mask
from packtrain.modeling.attention.varlen import (
    NAME,
    bounds_from_positions,
    choose_implementation,
    documents_of,
    register,
    varlen_attention_forward,
)
from tests.tiny import CONFIGS, tiny_model

register()

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
CU_SEQ_LENS = torch.tensor([0, 3, 5, 9], dtype=torch.int32)


# ------------------------------------------------------------------------------------- the mask function


def mask_for(create, *, batch_size=1, length=9, attention_mask=None, position_ids=None, cache=None, by=NAME, **config):
    """What a model with `packtrain_varlen` (or `by`) gets from one of transformers' mask builders."""
    config = AutoConfig.for_model("llama", **config)
    config._attn_implementation = by
    embeds = torch.zeros(batch_size, length, 4)
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return create(config, embeds, attention_mask=attention_mask, past_key_values=cache, **positions)


CAUSAL, WINDOW = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask


@pytest.mark.parametrize("create, config", [(CAUSAL, {}), (WINDOW, {"sliding_window": 2})])
def test_no_mask_for_one_row_without_padding(create, config):
    assert mask_for(create, position_ids=POSITIONS, **config) is None
    assert mask_for(create, **config) is None


@pytest.mark.parametrize("create, config", [(CAUSAL, {}), (WINDOW, {"sliding_window": 2})])
@pytest.mark.parametrize("row", [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]], ids=["right", "left"])
def test_padding_gets_the_mask_of_sdpa(create, config, row):
    padding = torch.tensor([row, [1] * 7])
    got = mask_for(create, batch_size=2, length=7, attention_mask=padding, **config)
    config = AutoConfig.for_model("llama", **config)
    config._attn_implementation = "sdpa"
    expected = create(config, torch.zeros(2, 7, 4), attention_mask=padding, past_key_values=None)
    assert got.dtype == torch.bool and not got.all()
    assert torch.equal(got, expected)


def test_several_packed_rows_get_the_block_mask_of_sdpa():
    mask = mask_for(CAUSAL, batch_size=2, position_ids=POSITIONS.expand(2, -1))
    assert mask.shape == (2, 1, 9, 9) and mask[1, 0, 4].int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_a_mask_it_cannot_name_is_built():
    """Chunks, blocks that see both ways, and custom additions, packed or not: sdpa's mask, never None."""
    # Whether chunks begin with the documents or with the row depends on the version of transformers.
    chunked, expected = (
        mask_for(masking_utils.create_chunked_causal_mask, position_ids=POSITIONS, attention_chunk_size=2, by=by)
        for by in (NAME, "sdpa")
    )
    assert torch.equal(chunked, expected) and 1 <= expected[0, 0, 8].sum() <= 2

    def with_blocks(*args, **kwargs):
        return CAUSAL(*args, block_sequence_ids=torch.tensor([[-1, 0, 0, -1, -1, -1, -1, -1, -1]]), **kwargs)

    assert mask_for(with_blocks)[0, 0, 1, 2]
    assert mask_for(with_blocks, position_ids=POSITIONS)[0, 0, 1, 2]

    def custom(*args, **kwargs):
        return CAUSAL(*args, and_mask_function=lambda b, h, q, kv: kv != 1, **kwargs)

    assert not mask_for(custom)[0, 0, :, 1].any()
    assert not mask_for(custom, position_ids=POSITIONS)[0, 0, :, 1].any()


def test_a_caller_that_wants_a_mask_gets_one():
    mask = mask_for(lambda *args, **kwargs: CAUSAL(*args, allow_is_causal_skip=False, **kwargs))
    assert torch.equal(mask[0, 0], torch.ones(9, 9, dtype=torch.bool).tril())


def test_decoding_gets_what_sdpa_gets():
    cases = [{"q_length": 1, "kv_length": 9, "q_offset": 8}, {"q_length": 3, "kv_length": 9, "q_offset": 6}]
    for case in cases:
        expected = masking_utils.sdpa_mask(batch_size=1, **case)
        got = varlen_mask(batch_size=1, **case)
        assert got is expected is None or torch.equal(got, expected)


# ----------------------------------------------------------------------------------------- the documents


def test_documents_from_offsets_and_positions():
    assert bounds_from_cu_seq_lens(torch.tensor([0, 3, 3, 5, 9, 9])) == (0, 3, 5, 9)
    assert bounds_from_positions(POSITIONS) == (0, 3, 5, 9)
    assert bounds_from_positions(POSITIONS + 2) == (0, 3, 5, 9)  # RoBERTa starts at 2
    assert bounds_from_positions(torch.arange(4)[None]) == (0, 4)
    assert bounds_from_positions(torch.zeros(1, 3)) == (0, 1, 2, 3)  # documents of one token
    assert bounds_from_positions(torch.tensor([[0, 1, 0], [0, 1, 2]])) == (0, 2, 3, 6)


def test_positions_are_read_as_transformers_reads_them():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 6, (7,), generator=generator).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        theirs = masking_utils.find_packed_sequence_indices(positions)[0]
        bounds = bounds_from_positions(positions)
        assert [b - a for a, b in zip(bounds, bounds[1:], strict=False)] == theirs.bincount().tolist()


def test_documents_are_read_once_and_again_after_a_write():
    source, reads = CU_SEQ_LENS.clone(), []

    def read(tensor):
        reads.append(1)
        return bounds_from_cu_seq_lens(tensor)

    assert documents_of(source, read) is documents_of(source, read)
    assert len(reads) == 1
    source[1] = 4
    assert documents_of(source, read).bounds == (0, 4, 5, 9)
    assert documents_of(source, read).cu_seq_lens.tolist() == [0, 4, 5, 9]
    assert len(reads) == 2
    with torch.inference_mode():
        frozen = CU_SEQ_LENS.clone()  # has no version counter, so nothing can be remembered safely
        assert documents_of(frozen, read).bounds == (0, 3, 5, 9)
        frozen[1] = 4
        assert documents_of(frozen, read).bounds == (0, 4, 5, 9)


def call(length=9, *, batch=1, keys=None, mask=None, module=None, **kwargs):
    """One call of the attention function with random inputs of 4 heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 4, n, 8, generator=generator) for n in (length, keys or length, keys or length))
    return varlen_attention_forward(module or SimpleNamespace(is_causal=True), q, k, v, mask, **kwargs)[0]


def test_offsets_positions_and_a_block_mask_say_the_same():
    alone = call()
    by_offsets = call(cu_seq_lens_q=CU_SEQ_LENS, cu_seq_lens_k=CU_SEQ_LENS)
    assert torch.equal(by_offsets, call(position_ids=POSITIONS))
    document = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    block = (document[:, None] == document) & torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(by_offsets, call(mask=block[None, None]))
    assert (by_offsets - alone).abs().max() > 0.1  # negative control: documents matter
    assert torch.equal(alone, call(position_ids=torch.arange(9)[None]))


def test_packed_rows_without_a_mask_are_told_by_their_positions():
    """Encoders, and decoders with a cache, get no mask from transformers for them."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    packed, plain = call(batch=2, position_ids=positions), call(batch=2)
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 9])
    block = (document[:, :, None] == document[:, None]) & torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(packed, call(batch=2, mask=block[:, None]))
    torch.testing.assert_close(packed[1], plain[1])
    assert (packed[0] - plain[0]).abs().max() > 0.1
    assert torch.equal(plain, call(batch=2, position_ids=torch.arange(9).expand(2, 9)))


def test_a_mask_of_ones_does_not_open_documents():
    """With sdpa an all-ones mask beside a flat batch lets documents see each other; here it cannot."""
    packed = call(cu_seq_lens_q=CU_SEQ_LENS)
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(packed, call(cu_seq_lens_q=CU_SEQ_LENS, mask=causal))


def test_direction_comes_from_the_argument_before_the_module():
    bidirectional = SimpleNamespace(is_causal=False)
    for packed in ({}, {"cu_seq_lens_q": CU_SEQ_LENS}):
        both_ways = call(module=bidirectional, **packed)
        assert torch.equal(both_ways, call(is_causal=False, **packed))
        assert not torch.allclose(both_ways, call(**packed))


def test_window_of_the_layer_is_honoured():
    packed = call(cu_seq_lens_q=CU_SEQ_LENS, sliding_window=2)
    window = torch.ones(9, 9, dtype=torch.bool).tril().triu(-1)[None, None]
    torch.testing.assert_close(packed, call(cu_seq_lens_q=CU_SEQ_LENS, mask=window))
    assert not torch.allclose(packed, call(cu_seq_lens_q=CU_SEQ_LENS))
    torch.testing.assert_close(call(sliding_window=2), call(mask=window))  # a plain row keeps its window too


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"length": 12, "cu_seq_lens_q": CU_SEQ_LENS}, "documents end at 9 of 12 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 3, 9])}, "do not fit the row"),
        ({"cu_seq_lens_q": torch.tensor([3, 9])}, "do not fit the row"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": torch.tensor([0, 4, 5, 9])}, "differs"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "keys": 20}, "something else"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "batch": 2}, "something else"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "mask": torch.ones(1, 9)}, "mask of shape"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "indices": torch.ones(1)}, "`indices`"),
        ({"cu_seq_lens_q": CU_SEQ_LENS, "output_attentions": True}, "weights"),
        ({"cache": object()}, "paged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(arguments, says):
    with pytest.raises(ModelError, match=says):
        call(**arguments)


def test_cross_attention_is_refused_only_when_packed():
    cross = SimpleNamespace(is_causal=False, is_cross_attention=True)
    call(module=cross)
    with pytest.raises(ModelError, match="something else"):
        call(module=cross, cu_seq_lens_q=CU_SEQ_LENS)
    call(keys=20, module=cross, cu_seq_lens_q=torch.tensor([0, 9]))  # one document has nobody to leak to


def test_a_window_that_the_layer_keeps_to_itself_is_refused_where_it_matters():
    """Some models put the window into the mask only; without a mask it would be lost."""
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(sliding_window=3), layer_idx=0)
    with pytest.raises(ModelError, match="window of 3"):
        call(module=module, cu_seq_lens_q=CU_SEQ_LENS)
    call(length=5, module=module, cu_seq_lens_q=torch.tensor([0, 3, 5]))
    module.config.layer_types = ["full_attention"]
    call(module=module, cu_seq_lens_q=CU_SEQ_LENS)


# -------------------------------------------------------------------------------- not packed: exactly sdpa


def both(family: str):
    sdpa = "eager" if family == "gemma2" else "sdpa"  # transformers has no sdpa for scores with a softcap
    return tiny_model(family, attn_implementation=NAME), tiny_model(family, attn_implementation=sdpa)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, family: str, real: torch.Tensor | None = None):
    if real is not None:
        ours, theirs = ours[real], theirs[real]
    if family == "gemma2":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_and_plain_batches_are_bitwise_sdpa(family):
    ours, theirs = both(family)
    ids = torch.randint(3, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    right = (torch.arange(17) < torch.tensor([[17], [9], [12]])).long()
    for batch in (
        {"input_ids": ids},
        {"input_ids": ids[:1]},
        {"input_ids": ids[:1], "use_cache": False},
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids, "attention_mask": right},
        {"input_ids": ids, "attention_mask": right.flip(1)},  # left padding
        {"input_ids": ids[2:], "attention_mask": right.flip(1)[2:]},
    ):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert_same(ours(**batch).logits, theirs(**batch).logits, family, real)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_is_bitwise_sdpa(family, rows):
    ours, theirs = both(family)
    ids = torch.randint(3, 60, (rows, 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11) >= torch.tensor([[0], [4]]))[:rows].long()  # the second row is padded on the left
    options = dict(max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True)
    a, b = (model.generate(ids, attention_mask=mask, **options) for model in (ours, theirs))
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores, strict=True):
        assert_same(x, y, family)


def test_encoders_and_sinks_when_not_packed():
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    bert = AutoConfig.for_model("bert", **small)
    oss = dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    oss = AutoConfig.for_model("gpt_oss", **small, **oss, layer_types=["sliding_attention", "full_attention"])
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    for config, auto, reference in ((bert, AutoModel, "sdpa"), (oss, AutoModelForCausalLM, "eager")):
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        for batch in ({"input_ids": ids}, {"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
            model.set_attn_implementation(reference)
            theirs = model(**batch)[0]
            model.set_attn_implementation(NAME)
            ours = model(**batch)[0]
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    "requested, layout, device, dtype, expected",
    [
        ("auto", "flat", "cpu", torch.float32, NAME),
        ("auto", "padded", "cpu", torch.float32, None),
        ("auto", "flat", "cuda", torch.bfloat16, NAME),
        ("eager", "flat", "cpu", torch.float32, "eager"),
        (NAME, "padded", "cpu", torch.float32, NAME),
        ("flash_attention_2", "flat", "cuda", torch.bfloat16, "flash_attention_2"),
        ("flex_attention", "flat", "cuda", torch.bfloat16, "flex_attention"),
        (
            "kernels-community/vllm-flash-attn3",
            "flat",
            "cuda",
            torch.bfloat16,
            "kernels-community/vllm-flash-attn3",
        ),
    ],
)
def test_choice(requested, layout, device, dtype, expected):
    assert choose_implementation(requested, layout, device, dtype) == expected


@pytest.mark.parametrize(
    "requested, device, dtype, says",
    [
        ("spda", "cpu", torch.float32, "did you mean sdpa"),
        ("flash_attention_2", "cpu", torch.float32, "CUDA"),
        ("flash_attention_2", "cuda", torch.float32, "bfloat16"),
        ("flex_attention", "cpu", torch.float32, "backward"),
    ],
)
def test_choices_that_cannot_train_are_refused(requested, device, dtype, says):
    with pytest.raises(ModelError, match=says):
        choose_implementation(requested, "flat", device, dtype)


def test_the_name_does_not_pass_for_flash_attention():
    assert "flash" not in NAME
    assert register() == register() == NAME
