"""FLOPs of training, attention counted per document, and the share of a device's peak that they make.

For documents of L tokens and N supervised positions of a batch, a forward pass of the model costs

    layers   sum over documents of (linear * L + quadratic * L^2)      see packtrain.packing.cost
    head     2 * hidden size * vocabulary * N                          it runs where something is predicted

and training three times that (the backward pass has two matrix products for each of the forward's). With
frozen weights (LoRA) the matrix products of the layers need no weight gradient: they count twice, attention
still three times.

These are the FLOPs the examples need, the same for every layout: padding, masked attention between documents
and recomputed activations cost time and count nothing. MFU (PaLM, Chowdhery et al. 2022, appendix B) is FLOPs
per second over the device's dense peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from packtrain.modeling.cost import cost_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Dense bf16/fp16 tensor-core peak in TFLOP/s, by words of the device's name; from the vendors' data sheets.
PEAK_TFLOPS = (
    ("H200", 989.5),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.5),
    ("GH200", 989.5),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
HALF_PRECISION = ("bfloat16", "float16")


def training_flops(config: PreTrainedConfig, *, frozen: bool) -> Callable[[np.ndarray, int], float]:
    """Return a function that counts the FLOPs of one training pass: `(document lengths int [S], supervised positions)`.

    Args:
        config: of the model.
        frozen: whether the layers' weights are frozen (LoRA).
    """
    text = config.get_text_config()
    cost, head = cost_of(text), 2 * text.hidden_size * text.vocab_size
    linear_passes = 2 if frozen else 3

    def flops(lengths: np.ndarray, supervised: int) -> float:
        lengths = np.asarray(lengths, dtype=np.float64)
        layers = linear_passes * cost.linear * lengths.sum() + 3 * cost.quadratic * (lengths**2).sum()
        return float(layers + linear_passes * head * supervised)

    return flops


def peak_flops(device: str | None, dtype: str | None) -> float | None:
    """Look up the FLOP/s a device reaches at most in this dtype; None where that isn't known."""
    if device is None or dtype not in HALF_PRECISION:
        return None
    words = device.replace("-", " ").split()
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS if set(name.split()) <= set(words)), None)
