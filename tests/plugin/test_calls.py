"""When `packtrain.attach` may be called, and who says what it has done."""

from __future__ import annotations

import datasets
import pytest
from transformers import TrainerCallback

import packtrain
from packtrain.errors import PacktrainError
from tests.plugin.test_attach import stock_trainer
from tests.tiny import random_documents, tiny_model


@pytest.fixture(scope="module")
def documents() -> datasets.Dataset:
    return datasets.Dataset.from_list(random_documents([5, 9, 23, 6, 14, 30, 7, 8, 11]))


def test_a_trainer_that_trains_is_refused(tmp_path, documents):
    """Its batches are made by then; what `attach` says of them would be true of the next training only."""

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            packtrain.attach(trainer)

    trainer = stock_trainer(tmp_path, documents, max_steps=2)
    trainer.add_callback(Late())
    with pytest.raises(PacktrainError, match="trainer: has begun to train(.|\n)*attach before trainer.train"):
        trainer.train()
    trainer = stock_trainer(tmp_path, documents, max_steps=2)
    trainer.train()
    packtrain.attach(trainer)  # control: it has trained, and may again


def test_a_model_that_runs_without_padding_is_refused(tmp_path, documents):
    trainer = stock_trainer(tmp_path, documents)
    with packtrain.unpad(trainer.model):
        with pytest.raises(PacktrainError, match="trainer.model: is unpadded already(.|\n)*remove"):
            packtrain.attach(trainer)
    packtrain.attach(trainer)


def test_rows_beyond_the_positions_of_a_model_are_named(tmp_path, documents, caplog):
    """The error of an embedding says nothing of rows, and on a GPU it ends the process; a rotary embedding has no end."""
    trainer = stock_trainer(tmp_path, documents)
    trainer.model = tiny_model("gpt2", n_positions=16)
    with pytest.raises(
        PacktrainError, match="an example has 30 tokens, and the model 16 positions(.|\n)*truncate these"
    ):
        packtrain.attach(trainer)
    for most, said in ((30, False), (29, True)):
        caplog.clear()
        trainer = stock_trainer(tmp_path, documents)
        trainer.model.config.max_position_embeddings = most
        packtrain.attach(trainer)
        assert ("the longest example has 30 tokens, and the model was made for 29 positions" in caplog.text) is said


@pytest.mark.parametrize("layout", ["flat", "unpad"])
def test_one_rank_speaks_for_all(tmp_path, documents, caplog, layout):
    trainers = [stock_trainer(tmp_path, documents) for _ in range(2)]
    trainers[1].is_world_process_zero = lambda: False
    for trainer, lines in zip(trainers, (1, 0), strict=True):
        caplog.clear()
        packtrain.attach(trainer, layout=layout)
        assert sum("as before" in message for message in caplog.messages) == lines
