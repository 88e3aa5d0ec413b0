"""What a document costs to compute: `linear * length + quadratic * length**2`, in FLOPs of one forward pass.

The matrix products of a token don't depend on where it stands: 2 FLOPs per weight. Attention does: every
query meets the keys of its document. PaLM (Chowdhery et al. 2022, appendix B) counts per token, forward,
`2 * weights + 4 * layers * heads * head_dim * length`; summed over the document that is the formula above.
A backward pass costs twice a forward pass, both terms alike, so it drops out of every comparison.

    >>> Cost.of_config({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    ...                 "num_attention_heads": 32}, causal=False)
    Cost(linear=12952010752.0, quadratic=524288.0)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packtrain.errors import PlanError
from packtrain.recipe.sections import ModelSection


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a document of `length` tokens: `linear * length + quadratic * length**2`.

    The default counts tokens. Only the ratio of the two matters to a plan.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self):
        if not (np.isfinite([self.linear, self.quadratic]).all() and self.linear > 0 and self.quadratic >= 0):
            raise PlanError("a cost needs linear > 0 and quadratic >= 0", value=(self.linear, self.quadratic))

    def __call__(self, lengths: np.ndarray | int) -> np.ndarray:
        """Returns the float64 cost of each length."""
        lengths = np.asarray(lengths, dtype=np.float64)
        return lengths * (self.linear + self.quadratic * lengths)

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | Any, *, causal: bool = True) -> Cost:
        """Returns the cost model of a transformer from its config (a mapping, or an object with attributes).

        linear = 2 * weights that a token meets in the layers: query, key, value and output projections (fewer
        key/value heads under GQA), MLP (three matrices when gated, two otherwise; for a mixture of experts the
        router's `num_experts_per_tok` experts and the shared ones). The LM head is left out: it runs at
        supervised positions only, whatever the layout. quadratic = 4 * layers * heads * head_dim, half of it when `causal`
        (flash kernels skip the masked half). A layer with a sliding window of W reads at most W keys per
        query, so its attention is counted in the linear term: exact for documents much longer than W.

        Raises:
            PlanError: the config lacks hidden size, layers or heads.
        """
        config = getattr(config, "get_text_config", lambda: config)()
        get = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)

        def first(*names: str, default: Any = None) -> Any:
            return next((value for name in names if (value := get(name)) is not None), default)

        hidden, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "num_layers")
        heads = first("num_attention_heads", "n_head", "num_heads")
        if not (hidden and layers and heads):
            raise PlanError(
                "a cost model needs hidden size, number of layers and number of heads",
                key="model.config",
                fix="give them in the config, or pass packtrain.packing.cost.Cost(linear=..., quadratic=...)",
            )
        head_dim = first("head_dim", default=hidden // heads)
        key_value_heads = first("num_key_value_heads", default=heads)
        projections = 2 * hidden * head_dim * (heads + key_value_heads)
        mlp = _mlp_weights(first, hidden)
        pairs = (2 if causal else 4) * heads * head_dim  # FLOPs per (query, key) of one layer, all heads

        windowed, window = _windowed_layers(first, layers), first("sliding_window", default=0) or 0
        linear = layers * 2 * (projections + mlp) + windowed * 4 * heads * head_dim * window
        return cls(linear=float(linear), quadratic=float((layers - windowed) * pairs))


def _mlp_weights(first, hidden: int) -> float:
    """Counts the weights of one layer's MLP that a single token meets."""
    gated = first("model_type") not in {
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "opt",
        "bloom",
        "phi",
        "falcon",
        "bert",
        "roberta",
    }
    matrices = 3 if gated else 2
    wide = first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    if isinstance(wide, (list, tuple)):  # Gemma 3n's, one for every layer
        wide = sum(wide) / len(wide)
    experts = first("num_experts_per_tok", "num_experts_per_token", default=0)
    if not experts:
        return matrices * hidden * wide
    expert_width = first("moe_intermediate_size", default=wide)
    shared = first("n_shared_experts", default=0) * expert_width + first("shared_expert_intermediate_size", default=0)
    return matrices * hidden * (experts * expert_width + shared)


def _windowed_layers(first, layers: int) -> int:
    """Counts the layers that attend within a sliding window only."""
    types = first("layer_types")
    if types is not None:
        return sum(kind == "sliding_attention" for kind in types)
    use = first("use_sliding_window", default=True)
    return layers if use and first("sliding_window") else 0


def config_at_hand(section: ModelSection) -> dict[str, Any]:
    """Returns the fields of the config as far as they are known without the Hub and without importing transformers."""
    if section.config is not None:
        return section.config
    name = section.model_name_or_path or ""
    path = Path(name, "config.json")
    if not path.parent.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=section.revision)
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
