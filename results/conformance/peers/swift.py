"""ms-swift: its trainer, built by the `run` of its `sft` command; imported in its own environment only.

Its arguments refuse packing and `padding_free` without flash-attention, which needs a GPU. There its packer and its
collator alone are asked, in the trainer that pads: what is about batches of documents, and nothing of the model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from results.conformance.arguments import COMMON, sizes, world_size
from results.conformance.questions import QUESTIONS, Setting
from results.conformance.rows import Job, Row, model_directory, words, write_lines

OF_BATCHES = ("first labels", "positions", "end tokens", "as given", "long rows", "size")
NEEDS_A_GPU = (
    "its arguments refuse this without flash-attention, which needs a GPU; its packer and collator alone were asked"
)


def messages(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    pairs = [(("user", words(row.prompt)), ("assistant", f" {words(row.completion)}")) for row in rows]
    return [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in pairs]


def trainer(job: Job, *, layout: str = "padded") -> Any:
    from swift.arguments import SftArguments
    from swift.dataset import PackingDataset
    from swift.pipelines.train.sft import SwiftSft
    from swift.trainers.patcher import PrinterCallbackNew

    class Built(SwiftSft):
        """Returns the trainer in the place of what training it says."""

        def train(self, trainer: Any) -> Any:
            return trainer

    root = Path(job.directory)
    for name, rows in (("rows", job.rows), ("held_out", job.held_out)):
        write_lines(root / f"{name}.jsonl", messages(rows))
    counted = sizes(job, world_size(), lambda given: len(trainer(given, layout=layout).train_dataset))
    given = COMMON | counted | dict(tuner_type="full", model_type=job.model, template="dummy", torch_dtype="float32")
    given |= dict(model=model_directory(job, root.parent), dataset=[str(root / "rows.jsonl")], attn_impl="sdpa")
    given |= dict(max_length=job.max_length, loss_scale="all" if job.everywhere else "default", split_dataset_ratio=0)
    given |= dict(gradient_checkpointing=False, load_from_cache_file=False, add_version=False, check_model=False)
    if job.held_out:
        given |= dict(val_dataset=[str(root / "held_out.jsonl")], eval_strategy="no")
    made = Built(SftArguments(**given)).run()
    made.remove_callback(PrinterCallbackNew)  # counts from the beginning of training, before which it is evaluated here
    if layout == "packed":
        made.train_dataset = PackingDataset(made.template, made.train_dataset)
    elif layout == "flat":
        made.template.padding_free = True
    return made


def setting(name: str, layout: str) -> Setting:
    packages = ("ms-swift", "transformers")
    not_asked = {} if layout == "padded" else {one: NEEDS_A_GPU for one in QUESTIONS if one not in OF_BATCHES}
    not_asked["isolated, hybrid"] = "it has no such model"
    build = partial(trainer, layout=layout)
    return Setting(name=name, packages=packages, build=build, environment="swift", not_asked=not_asked)


SETTINGS = (
    setting("ms-swift, padding", "padded"),
    setting("ms-swift, padding_free", "flat"),
    setting("ms-swift, packing", "packed"),
)
