"""Signatures of the varlen kernels that CUDA has, as their releases declare them: read from their sources, not from memory.

Each function here is a stand-in that computes something of the right shape and with gradients, whose parameters, kinds and
defaults are those of the release; `SOURCES` says where they were read.
"""

from __future__ import annotations

from torch import Tensor

SOURCES = {
    "torch 2.11": "torch/nn/attention/varlen.py in the wheel of torch 2.11.0 (git 70d99e998b4955e0049d13a98d77ae1b14db1f45)",
    "torch 2.13": "torch/nn/attention/varlen.py in the wheel of torch 2.13.0",
    "flash-attn 2.8": "flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention, the same at v2.8.0, v2.8.3 "
    "(060c9188beec3a8b62b33a3bfa6d5d2d44975fab) and v2.8.3.post1",
}


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
) -> Tensor:  # fmt: skip
    return stand_in(query, key, value, scale)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
) -> Tensor:  # fmt: skip
    return stand_in(query, key, value, scale)


def flash_attn_2_8(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
) -> Tensor:  # fmt: skip
    return stand_in(q, k, v, softmax_scale)


def stand_in(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes something of all three, of the shape of `query` `[T, H, D]`, with gradients."""
    groups = query.shape[1] // key.shape[1]
    return query * scale + (key + value).repeat_interleave(groups, dim=1)


SIGNATURES = {"torch 2.11": torch_2_11, "torch 2.13": torch_2_13, "flash-attn 2.8": flash_attn_2_8}
