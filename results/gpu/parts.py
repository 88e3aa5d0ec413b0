"""The parts of the study in order of worth, with the seconds that each may take, and the shapes they run.

Lengths are those of transformers' pull request 47340: `lognormvariate(5.0, 1.0)`, cut to 16..1,024, 32 sequences an
update, 50 updates. Its figures (Qwen2.5-0.5B on 2x RTX 5090, gradient checkpointing) stand in `UPSTREAM`, for the page.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from results.gpu.schedule import Part

UPSTREAM = {"random": 15_873, "group_by_length": 24_485, "batch_rebalance": 25_085}  # real tokens/s
PAPER = {"padding": 742, "padding-free": 1_408, "offline packing": 3_010}  # tokens/s, arXiv 2407.09105, 8 A100


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model with random weights.

    Attributes:
        config: fields of its architecture.
        dtype: of the weights in training; on the drive they are bfloat16.
    """

    config: Mapping[str, Any]
    dtype: str = "float32"


_QWEN = dict(model_type="qwen2", vocab_size=151_936, max_position_embeddings=32_768, tie_word_embeddings=True)
_QWEN |= dict(rope_theta=1_000_000.0, rms_norm_eps=1e-6, num_key_value_heads=2)
SHAPES: dict[str, Shape] = {
    "Qwen2.5-0.5B": Shape(
        config=_QWEN | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
    ),
    "Qwen2.5-1.5B": Shape(
        config=_QWEN | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    ),
    "Mistral-7B": Shape(
        config=dict(
            model_type="mistral",
            vocab_size=32_000,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32_768,
            sliding_window=None,
        ),
        dtype="bfloat16",
    ),
}
LOGITS = dict(model_type="llama", vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4)
LOGITS |= dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True)
TINY = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, max_position_embeddings=256)


def config_of(shape: str, *, small: bool) -> dict[str, Any]:
    """Return the fields of a shape, or those of a tiny model of its architecture."""
    return {**SHAPES[shape].config} | (TINY if small else {})


# What lays out the updates, by the name of the line. `trainer` and keys of the recipe, as a comparison has them.
WAYS: dict[str, dict[str, Any]] = {
    "balanced": {"batching.strategy": "balanced"},
    "pad_longest": {"batching.strategy": "pad_longest"},
    "trl:padding_free": {"trainer": "trl:padding_free"},
    "batch_rebalance": {"trainer": "transformers:batch_rebalance"},
    "balanced, compiled": {"batching.strategy": "balanced", "training.torch_compile": True},
    "dense": {"batching.strategy": "pad_longest", "batching.examples_per_step": 8},  # equal lengths, no padding
    "trl:packing_bfd": {"trainer": "trl:packing_bfd"},
    "group_by_length": {"trainer": "transformers:group_by_length"},
    "trl:padding": {"trainer": "trl:padding"},
}
IBM: dict[str, dict[str, Any]] = {  # as recipes/compare/ibm_packing.yaml has them
    "padding": {"batching.strategy": "pad_longest"},
    "padding-free": {"batching.strategy": "balanced"},
    "offline packing": {"batching.strategy": "bfd", "batching.tokens_per_step": 16_384},
}
LOGIT_WAYS = {"chunks": "chunks", "whole logits": "whole", "trl": "trl"}


def _needs(way: str) -> tuple[str, ...]:
    return ("trl",) if way.startswith("trl") else ()


def _speed(shape: str, way: str, seconds: float) -> Part:
    compiled = 60 if "compiled" in way else 0
    return Part(
        name=f"{shape} {way}",
        work="results.gpu.speed:measure",
        arguments={"shape": shape, "way": way},
        seconds=seconds + compiled,
        weights=shape,
        needs=_needs(way),
    )


def _small_model(way: str) -> Part:
    return _speed("Qwen2.5-0.5B", way, 45)


PARTS: tuple[Part, ...] = (
    Part(name="attention kernels", work="results.gpu.kernels:measure", seconds=40),
    Part(name="equivalence in bf16", work="results.gpu.equivalence:measure", seconds=45),
    Part(name="unpad", work="results.gpu.equivalence:measure_unpad", seconds=40),
    *map(_small_model, ["balanced", "pad_longest", "trl:padding_free", "batch_rebalance", "dense", "trl:packing_bfd"]),
    *(
        Part(
            name=f"128k vocabulary {name}",
            work="results.gpu.logits:measure",
            arguments={"way": way},
            seconds=40,
            needs=_needs(way),
        )
        for name, way in LOGIT_WAYS.items()
    ),
    *map(_small_model, ["balanced, compiled", "group_by_length", "trl:padding"]),
    *(
        Part(
            name=f"Mistral-7B LoRA {row}",
            work="results.gpu.speed:measure_ibm",
            arguments={"row": row},
            seconds=75,
            weights="Mistral-7B",
        )
        for row in IBM
    ),
    *(_speed("Qwen2.5-1.5B", way, 60) for way in WAYS),
)


def weights_part(shape: str) -> Part:
    """Return the part that makes the weights of a shape and keeps them on the drive for the parts that load them."""
    seconds = {"Mistral-7B": 75}.get(shape, 45)
    work = "results.gpu.speed:make_weights"
    return Part(name=f"weights of {shape}", work=work, arguments={"shape": shape}, seconds=seconds)


MACHINE = Part(name="machine", work="results.gpu.kernels:describe", seconds=120)
