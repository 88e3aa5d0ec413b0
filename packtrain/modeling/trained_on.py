"""What a model was trained on, in a file next to its weights: its folder may be moved, merged or uploaded without its run.

{"prompts": ["text"], "base_weights": null}                     packtrain.json
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig

from packtrain.errors import ModelError
from packtrain.modeling.stored_weights import base_weights
from packtrain.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

FILE = "packtrain.json"


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """How the rows were written out, and what an adapter belongs to.

    Attributes:
        prompts: see `packtrain.data.report.DataReport.prompts`.
        base_weights: of an adapter, those that it was trained on, see `base_weights`; None for a model from scratch, and
            for a whole model.
    """

    prompts: tuple[str, ...] = ()
    base_weights: str | None = None

    def save(self, folder: Path) -> None:
        """Writes the file into the folder of a model."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_trained_on(name: str | Path) -> TrainedOn | None:
    """Reads what a model was trained on; None where nothing says it, as for models of other trainers.

    Args:
        name: the folder of a model or of an adapter, or a name on the Hub.
    """
    try:
        path = Path(name, FILE) if Path(name).is_dir() else Path(hf_hub_download(str(name), FILE))
        facts = json.loads(path.read_text(encoding="utf-8"))
        base = facts["base_weights"]
        return TrainedOn(prompts=tuple(map(str, facts["prompts"])), base_weights=base if base is None else str(base))
    except (OSError, ValueError, KeyError, TypeError, hub.HfHubHTTPError, hub.OfflineModeIsEnabled):
        return None


def base_of_adapter(section: ModelSection, config: PreTrainedConfig | None = None) -> str | None:
    """Returns what identifies the weights under a recipe's adapter: those that it names, and `merge_adapter` in them."""
    return base_weights(section.model_copy(update={"continue_adapter": None}), config)


def check_base(folder: Path, section: ModelSection, config: PreTrainedConfig) -> None:
    """Checks that an adapter is put on the weights that it was trained on.

    Args:
        folder: of the adapter.
        section: the `model:` that its base was loaded by.
        config: that of the base. Another commit on the Hub is only warned of: it may change no weights.

    Raises:
        ModelError: the folder of the base holds other weights now, or lacks what was merged into it before.
    """
    known, found = read_trained_on(folder), base_of_adapter(section, config)
    if known is None or known.base_weights in (None, found):
        return
    name = section.model_name_or_path
    if name is None or Path(name).is_dir():
        what = f"is an adapter that was trained on other weights than those of {name or 'a model from scratch'}"
        fix = "name its run, restore the base that it was trained on, or train the adapter again"
        raise ModelError(what, key="RUN_OR_MODEL", value=str(folder), fix=fix)
    logger.warning("%s was trained on %s, and is used on %s", folder, known.base_weights, found)
