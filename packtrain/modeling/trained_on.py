"""What a model was trained on, in a file next to its weights: its folder may be moved, merged or uploaded without its run.

{"prompts": ["text"], "base_weights": null}                     packtrain.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download

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
