"""Runs over pairs: the reference and its cache, losses in chunks, resumed runs, several ranks, and models that can't."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from packtrain.cli import main
from packtrain.data.store import cache_root
from packtrain.errors import ModelError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.objectives import chunks, logits
from packtrain.objectives.preference.loss import FORMULAS, preference_loss
from packtrain.objectives.preference.reference import read_reference, reference_weights
from packtrain.training.run import build, fit
from tests.objectives.preference.helpers import pair_recipe, pair_rows, write_pairs

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(30))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def logps(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    found = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return found[prompt - 1 : -1].gather(1, ids[prompt:, None]).sum()


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_model_before_training(rows, tmp_path, cache, lora):
    trainer = build(pair_recipe(rows, tmp_path / "run", lora=lora, objective__shared_prefix=True))
    examples, model = trainer.train_dataset, trainer.model
    model.eval()
    for example in (0, 7, 29):
        prompt, chosen = int(examples.prompt[example]), int(examples.chosen[example])
        ids = torch.from_numpy(examples[example]["input_ids"])
        with torch.no_grad():
            if lora:
                assert abs(float(logps(model, ids[: prompt + chosen], prompt)) - examples.reference[example, 0]) > 1e-2
                with model.disable_adapter():
                    expected = [
                        logps(model, part, prompt) for part in ids.split([prompt + chosen, len(ids) - prompt - chosen])
                    ]
            else:
                expected = [
                    logps(model, part, prompt) for part in ids.split([prompt + chosen, len(ids) - prompt - chosen])
                ]
        np.testing.assert_allclose(examples.reference[example], torch.stack(expected).numpy(), rtol=1e-5)


def test_the_reference_is_computed_once_and_kept(rows, tmp_path, cache, monkeypatch):
    from packtrain.objectives.preference import reference

    computed: list[int] = []
    compute = reference.compute_reference

    def counting(*args):
        computed.append(1)
        return compute(*args)

    monkeypatch.setattr(reference, "compute_reference", counting)

    def built(**changes):
        return build(pair_recipe(rows, tmp_path / "run", **changes))

    first = built()
    (file,) = cache.iterdir()
    again = built(batching__examples_per_step=3, objective__beta=0.5, training__learning_rate=1e-5)
    assert len(computed) == 1 and np.array_equal(again.train_dataset.reference, first.train_dataset.reference)
    built(training__seed=1)  # other weights
    assert len(computed) == 2 and len([*cache.iterdir()]) == 2
    built(training__bf16=True)
    assert len(computed) == 3
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    assert read_reference(file, 30) is None
    assert np.array_equal(built().train_dataset.reference, first.train_dataset.reference) and len(computed) == 4
    assert read_reference(file, 30) is not None and read_reference(file, 29) is None
    assert cache_root() in file.parents


def test_a_weight_changes_the_key(rows, tmp_path, cache):
    model = build(pair_recipe(rows, tmp_path / "run")).model
    before = reference_weights(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[12345 % 7] += 1e-6
    assert reference_weights(model) != before


@pytest.mark.parametrize("kind", FORMULAS)
def test_losses_in_chunks_are_those_of_whole_logits(rows, tmp_path, cache, kind, monkeypatch):
    trainer = build(pair_recipe(rows, tmp_path / "run", objective__shared_prefix=True))
    loss = preference_loss(kind, beta=0.3, label_smoothing=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["reference_logps"] = batch["reference_logps"] + torch.linspace(-2, 2, batch["reference_logps"].numel()).view(
        -1, 2
    )

    def computed() -> tuple:
        trainer.model.zero_grad()
        found = loss.losses(trainer.model, batch, head=trainer._head)
        (found.weighted_sum() * 0.37).backward()
        return found, {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    whole, expected = computed()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * trainer._head.out_features * 5)  # five positions at once
    logits._ways.pop(trainer._head, None)
    parts, found = computed()
    assert logits.computes_in_chunks(trainer._head) and parts.total is not None
    torch.testing.assert_close(parts.weighted_sum(), whole.weighted_sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 1e-3), name
    with torch.no_grad():
        torch.testing.assert_close(
            loss.losses(trainer.model, batch, head=trainer._head).scores, whole.scores, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_that_knows_no_prefixes_is_refused(rows, tmp_path, cache):
    """A Mamba's layers mix tokens of a document otherwise than by attention."""
    config = {
        "model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "expand": 2,
        "state_size": 8, "n_groups": 1, "chunk_size": 8,
    }  # fmt: skip
    changes = {"model__config": config, "training__max_steps": 1}
    with pytest.raises(ModelError) as refused:
        build(pair_recipe(rows, tmp_path / "run", objective__shared_prefix=True, **changes))
    assert "computes something else for answers that share a prompt" in str(refused.value)
    assert "set `objective.shared_prefix: false`" in str(refused.value)
    trainer = build(pair_recipe(rows, tmp_path / "run", **changes))  # the control: pairs without it
    assert SHARED not in next(iter(trainer.get_train_dataloader()))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("name", "lora"), [("preference", False), ("preference", True), ("reward", False)])
def test_a_resumed_run_ends_with_bitwise_the_same_weights(rows, tmp_path, cache, name, lora):
    def made(**changes):
        changes |= {"training__max_steps": 8, "training__save_strategy": "steps", "training__save_steps": 3}
        changes |= {"objective__name": name}
        return build(pair_recipe(rows, tmp_path / "run", lora=lora, objective__shared_prefix=True, **changes))

    unbroken = made()
    fit(unbroken)
    expected = weights(unbroken)
    assert cache.exists() == (name == "preference")
    for file in cache.glob("*"):
        file.unlink()  # computed anew: from the weights before training, not from those of the checkpoint
    resumed = made()
    if name == "preference":
        assert np.array_equal(resumed.train_dataset.reference, unbroken.train_dataset.reference)
    fit(resumed, str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 8
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param("preference", marks=pytest.mark.ci), "reward"])
def test_two_ranks_do_what_one_does(rows, tmp_path, objective):
    found = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
        done = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "tests.programs.pairs_on_ranks",
                str(rows),
                str(tmp_path / str(ranks)),
                objective,
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PACKTRAIN_CACHE": str(tmp_path / f"cache{ranks}")},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([json.loads((tmp_path / str(ranks) / f"rank{rank}.json").read_text()) for rank in range(ranks)])
    (alone,), both = found
    for rank in both:
        np.testing.assert_allclose(rank["reference"], alone["reference"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rank["curves"], alone["curves"], rtol=1e-4, atol=1e-5)
    for step, ids in enumerate(alone["read"]):
        assert sorted(both[0]["read"][step] + both[1]["read"][step]) == sorted(ids)
        assert all(ids.count(one) == 2 for one in ids)


def test_show_names_documents_and_prefixes(rows, tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            pair_recipe(rows, tmp_path / "run", data__max_length=400, objective__shared_prefix=True).to_dict(given=True)
        )
    )

    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*args])
        assert not ended.value.code
        return capsys.readouterr().out

    out = printed("show", str(recipe))
    assert "· chosen ─" in out and re.search(r"· rejected, goes on from the first \d+ tokens of document 0 ─", out)
    out = printed("show", str(recipe), "--set", "objective.shared_prefix=false", "--set", "strategy=pad_longest")
    assert "· chosen" in out and "· rejected" in out and "goes on from" not in out
    out = printed("plan", str(recipe), "--all")
    assert "pairs: 30, each of two documents" in out and "laid out once" in out
