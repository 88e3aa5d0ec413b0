"""torchtune: its recipe for one device, run from its file; imported in its own environment only.

A configuration names torchtune's own dataset, collator, loss and checkpointer. The recipe is watched through a subclass
that hands every micro-batch on, and through hooks of its optimizer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from results.conformance.questions import Setting
from results.conformance.rows import CONFIGS, EOS, PAD, Job, as_texts, model_directory, write_lines

SHAPE = CONFIGS["llama"]
HEADS, KEY_HEADS, WIDTH = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["hidden_size"]


class Words:
    """The study's tokenizer as one of torchtune's, with what torchtune has for tokenizers without special tokens."""

    def __init__(self, directory: str, max_seq_len: int, pad_id: int):
        from tokenizers import Tokenizer

        self.inner, self.max_seq_len, self.pad_id = (
            Tokenizer.from_file(f"{directory}/tokenizer.json"),
            max_seq_len,
            pad_id,
        )

    def encode(self, text: str, **_: Any) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        from torchtune.modules.transforms.tokenizers import tokenize_messages_no_special_tokens

        tokens, mask = tokenize_messages_no_special_tokens(self, sample.pop("messages"), eos_id=EOS)
        return sample | {"tokens": tokens, "mask": mask}


class Losses:
    """A metric logger that keeps losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.losses.append(float(payload["loss"]))

    def close(self) -> None: ...


class Recipe:
    """torchtune's recipe, looked at as a Trainer is."""

    def __init__(self, job: Job, *, packed: bool):
        import torchtune

        self.callbacks: list[Any] = []
        self.state = SimpleNamespace(log_history=[], global_step=0)
        path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
        spec = importlib.util.spec_from_file_location("full_finetune_single_device", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        outer = self

        class Watched(module.FullFinetuneRecipeSingleDevice):
            def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
                shown = {
                    "input_ids": batch["tokens"],
                    "labels": batch["labels"],
                    "position_ids": batch.get("input_pos"),
                }
                outer.loss_step, outer.batch = super()._loss_step, batch
                return outer.training_step(self._model, shown, None)

        given = configuration(job, packed=packed)
        self.recipe = Watched(cfg=given)
        self.recipe.setup(cfg=given)
        self.model = self.recipe._model
        self.recipe._optimizer.register_step_pre_hook(lambda *_: self.tell("on_pre_optimizer_step"))
        self.recipe._optimizer.register_step_post_hook(lambda *_: self.tell("on_step_end"))

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def tell(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(None, self.state, SimpleNamespace(), model=self)

    def training_step(self, model: Any, inputs: dict[str, Tensor], items: Any) -> Tensor:
        return self.loss_step(self.batch)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        given = {name: value.clone() for name, value in self.batch.items()}
        return self.loss_step(given | {"tokens": inputs["input_ids"], "labels": inputs["labels"]})

    def train(self) -> None:
        self.recipe.train()
        self.state.log_history = [{"loss": loss} for loss in self.recipe._metric_logger.losses]

    def named_gradients(self) -> dict[str, Tensor]:
        """Returns the gradients by the names, and in the order of rows, that transformers has."""
        from torchtune.models.convert_weights import tune_to_hf

        found = {name: weight.grad.clone() for name, weight in self.model.named_parameters()}
        return tune_to_hf(found, num_heads=HEADS, num_kv_heads=KEY_HEADS, dim=WIDTH)


def configuration(job: Job, *, packed: bool) -> Any:
    """Returns what its command would read from a file of YAML."""
    from omegaconf import OmegaConf
    from torchtune import config

    root = Path(job.directory)
    directory, here = model_directory(job, root.parent), "results.conformance.peers.torchtune"
    rows = as_texts(dataclasses.replace(job, everywhere=False), job.rows)
    write_lines(root / "rows.jsonl", rows)
    pad = EOS if job.pad_is_eos else PAD
    sections: dict[str, Any] = {
        "tokenizer": dict(_component_=f"{here}.Words", directory=directory, max_seq_len=job.max_length, pad_id=pad),
        "dataset": dict(
            _component_="torchtune.datasets.instruct_dataset",
            source="json",
            data_files=str(root / "rows.jsonl"),
            column_map={"input": "prompt", "output": "completion"},
            train_on_input=job.everywhere,
            packed=packed,
        ),
        "model": dict(
            _component_="torchtune.models.llama3.llama3",
            vocab_size=SHAPE["vocab_size"],
            num_layers=SHAPE["num_hidden_layers"],
            num_heads=HEADS,
            num_kv_heads=KEY_HEADS,
            embed_dim=WIDTH,
            intermediate_dim=SHAPE["intermediate_size"],
            max_seq_len=SHAPE["max_position_embeddings"],
            rope_base=10_000,
            norm_eps=1e-6,
        ),
        "checkpointer": dict(
            _component_="torchtune.training.FullModelHFCheckpointer",
            model_type="LLAMA3",
            checkpoint_dir=directory,
            output_dir=job.directory,
            checkpoint_files=["model.safetensors"],
        ),
        "optimizer": dict(_component_="torch.optim.AdamW", lr=1e-3),
        "loss": dict(_component_="torchtune.modules.loss.CEWithChunkedOutputLoss"),
        "metric_logger": dict(_component_=f"{here}.Losses"),
    }
    size, accumulation = job.per_device, job.accumulation
    if job.parts:
        made = OmegaConf.create(sections)
        size, accumulation = (
            len(config.instantiate(made.dataset, config.instantiate(made.tokenizer))) // job.parts,
            job.parts,
        )
    return OmegaConf.create(
        sections
        | dict(output_dir=job.directory, device="cpu", dtype="fp32", seed=7, shuffle=True, epochs=1, compile=False)
        | dict(max_steps_per_epoch=None if job.updates < 0 else job.updates, optimizer_in_bwd=False)
        | dict(batch_size=size, gradient_accumulation_steps=accumulation, resume_from_checkpoint=False)
    )


def setting(name: str, *, packed: bool) -> Setting:
    one_device = "asked of its recipe for one device only"
    not_asked = {
        "isolated, hybrid": "it has no such model",
        "ranks": one_device,
        "once": one_device,
        "resume": "its recipe writes a checkpoint at the end of an epoch only",
        "evaluation": "its recipe does not evaluate",
    }
    build = partial(Recipe, packed=packed)
    return Setting(name=name, packages=("torchtune",), build=build, environment="torchtune", not_asked=not_asked)


SETTINGS = (setting("torchtune, padding", packed=False), setting("torchtune, packed", packed=True))
