"""The recipe of a comparison: what it means, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from packtrain.cli import main
from packtrain.compare.experiment import KEYS, MEANINGS, load_experiment, with_settings
from packtrain.compare.manifest import check_same
from packtrain.compare.results import write_manifest
from packtrain.compare.run import describe
from packtrain.errors import PacktrainError, RecipeError
from packtrain.recipe.reader import load_recipe
from packtrain.training.portable import portable, shown_path
from tests.compare.synthetic_runs import make_manifest
from tests.compare.tiny_experiment import write_experiment


def test_variants_become_recipes(tmp_path):
    path = write_experiment(
        tmp_path,
        variants=["pad_longest", "bfd", {"name": "small", "batching.max_tokens": 600}, "trl:padding_free"],
        seeds=[3, 4],
        repeats=2,
    )
    experiment = load_experiment(path, ["repeats=3", "data.num_rows=70"])
    strategies = {variant.name: variant.recipe.batching.strategy for variant in experiment.variants}
    assert strategies == {
        "pad_longest": "pad_longest",
        "bfd": "bfd",
        "small": "balanced",
        "trl:padding_free": "padding_free",
    }
    kept = [variant.keeps_updates_of(experiment.of_reference) for variant in experiment.variants]
    assert kept == [True, False, True, True]
    small = experiment.variants[2].recipe
    assert (small.batching.max_tokens, small.data.num_rows) == (600, 70)
    assert [(turn.seed, turn.learns) for turn in experiment.rounds] == [
        (3, True), (4, True), (3, False), (4, False), (3, False), (4, False),
    ]  # fmt: skip
    assert experiment.eval_every == 2 and small.training["eval_strategy"] == "no"


def test_a_recipe_to_train_stands_for_a_comparison_of_itself(tmp_path):
    """Its own strategy with the usual ones that its settings allow, over twelve updates; a file says otherwise."""
    base = write_experiment(tmp_path).parent / "base.yaml"

    def strategies(*overrides: str) -> list[str]:
        return [variant.name for variant in load_experiment(base, overrides).variants]

    usual = ["pad_longest", "group_by_length", "padding_free", "balanced", "bfd"]
    experiment = load_experiment(base)
    assert strategies() == usual and experiment.name == "base" and experiment.reference == "pad_longest"
    assert {variant.recipe.training["max_steps"] for variant in experiment.variants} == {12}
    assert [(turn.seed, turn.learns) for turn in experiment.rounds] == [(42, True), (42, False), (42, False)]
    assert strategies("strategy=wrapped") == [*usual, "wrapped"]
    assert strategies("objective={name: masked_diffusion, tail: eos, canvas: batch_max}") == usual[:-1]
    by_tokens = load_experiment(base, ["strategy=bfd", "tokens_per_step=2048"]).variants
    assert [variant.recipe.batching.tokens_per_step for variant in by_tokens] == [None, None, None, None, 2048]
    shaped = load_experiment(base, ["shapes=4"]).variants
    assert [variant.recipe.batching.shapes for variant in shaped] == [None, None, 4, 4, 4]
    changed = load_experiment(base, ["repeats=1", "max_steps=5", "variants=[balanced, pad_longest]"])
    assert [variant.name for variant in changed.variants] == ["balanced", "pad_longest"] and len(changed.rounds) == 1
    assert {variant.recipe.training["max_steps"] for variant in changed.variants} == {5}
    with pytest.raises(RecipeError, match="did you mean `max_tokens`"):
        load_experiment(base, ["batching.max_tokns=8"])


def test_a_function_is_a_variant(tmp_path):
    name = "tests.programs.deadly:kill_this_process"
    experiment = load_experiment(write_experiment(tmp_path, variants=["pad_longest", name]))
    own = experiment.variants[1]
    assert own.name == own.recipe.batching.strategy == name and own.trainer == "packtrain"
    assert not own.keeps_updates_of(experiment.of_reference)  # it packs the epoch


def test_what_a_variant_shares_with_the_reference(tmp_path):
    """Only what sees the same examples in the same updates may be held against its loss curve."""
    changes = {
        "other batch": {"batching.examples_per_step": 4},
        "other data": {"data.num_rows": 50},
        "other order": {"training.data_seed": 9},
        "other rate": {"training.learning_rate": 0.1},
        "other end": {"training.num_train_epochs": 2},
    }
    variants = ["pad_longest", "bfd", *({"name": name, **change} for name, change in changes.items())]
    experiment = load_experiment(write_experiment(tmp_path, variants=variants))
    reference = experiment.of_reference
    shared = {v.name: (v.keeps_updates_of(reference), v.ends_with(reference)) for v in experiment.variants}
    assert shared == {
        "pad_longest": (True, "examples"),
        "bfd": (False, "examples"),
        "other batch": (False, "examples"),
        "other data": (False, None),
        "other order": (False, "examples"),
        "other rate": (True, "examples"),
        "other end": (True, None),
    }
    limited = load_experiment(write_experiment(tmp_path), ["training.max_steps=5"])
    assert limited.variants[1].ends_with(limited.of_reference) == "updates"


def test_more_rounds_are_the_same_experiment_and_other_settings_are_not(tmp_path):
    path = write_experiment(tmp_path)
    same = load_experiment(path).hash
    assert load_experiment(path, ["repeats=9"]).hash == same
    assert load_experiment(path, ["batching.strategy=balanced", "data.worker_timeout=300"]).hash == same  # defaults
    for override in ("measure_steps=7", "training.learning_rate=0.5", "reference=balanced"):
        assert load_experiment(path, [override]).hash != same


def test_ranks_are_read_and_make_another_experiment(tmp_path):
    path = write_experiment(tmp_path)
    assert load_experiment(path).ranks == 1
    two = load_experiment(path, ["ranks=2"])
    assert two.ranks == 2 and two.hash != load_experiment(path).hash == load_experiment(path, ["ranks=1"]).hash


def test_other_trainers_deal_equally_to_ranks(tmp_path):
    """Eight examples on three ranks: packtrain and packers can, the others can't."""
    path = write_experiment(tmp_path, variants=["pad_longest", "balanced", "trl:packing_bfd", "transformers:random"])
    with pytest.raises(RecipeError) as caught:
        load_experiment(path, ["ranks=3"])
    assert len(caught.value.problems) == 1
    assert "ranks: does not divide the 8 examples of an update, which transformers:random" in str(caught.value)
    assert load_experiment(path, ["ranks=3", "batching.examples_per_step=9"]).ranks == 3


def test_losses_of_other_predictions_are_told_apart(tmp_path):
    """A tail of tokens that are easy to guess has a lower loss, and teaches no better; a weight changes no prediction."""
    rainbow = {"objective": {"name": "masked_diffusion", "tail": "rainbow", "canvas": "fixed", "canvas_size": 64}}
    changes = {
        "same": {},
        "other rate": {"training.learning_rate": 0.1},
        "other mean": {"objective.norm": "token"},
        "other tail": {"objective.tail": "eos"},
        "other tokenizer": {"model.tokenizer_vocab_size": 320},
    }
    variants = [{"name": name, "batching.strategy": "pad_longest", **change} for name, change in changes.items()]
    path = write_experiment(tmp_path, variants=variants, reference="same", set=rainbow)
    experiment = load_experiment(path)
    alike = {variant.name for variant in experiment.variants if variant.scores_like(experiment.of_reference)}
    assert alike == {"same", "other rate", "other mean"}


def test_other_objectives_are_other_experiments(tmp_path):
    path = write_experiment(tmp_path)
    names = ("causal_lm", "masked_diffusion", "block_diffusion")
    hashes = {load_experiment(path, [f"objective.name={name}"]).hash for name in names}
    assert len(hashes) == 3


@pytest.mark.parametrize("trainer", ["trl:padding", "transformers:random"])
@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (["objective.name=preference", "data.path=packtrain:preference"], "objective.name", "preference"),
        (["objective.name=masked_diffusion"], "objective.name", "masked_diffusion"),
        (["objective.loss_weighting=example"], "objective.loss_weighting", "example"),
    ],
)
def test_other_trainers_refuse_an_objective_that_is_not_theirs(tmp_path, trainer, changes, key, value):
    """They would fine-tune a language model under the name of another objective."""
    named = {"name": "theirs", "trainer": trainer}
    with pytest.raises(RecipeError) as caught:
        load_experiment(write_experiment(tmp_path, variants=["pad_longest", named]), changes)
    (problem,) = caught.value.problems
    assert (problem.where, problem.key, problem.value) == ("variant theirs", key, value)
    assert f"is not what {trainer} trains" in str(problem) and "leave this variant out" in str(problem)
    load_experiment(write_experiment(tmp_path), changes)  # packtrain's own strategies train it
    load_experiment(write_experiment(tmp_path, variants=["pad_longest", named]))


def test_runs_go_together_only_with_runs_of_the_same(tmp_path):
    before = make_manifest([("pad_longest", "packtrain", True)], rounds=2, data={"examples": 9}, git={"commit": "a"})
    write_manifest(tmp_path, before)
    check_same(tmp_path, before)
    first, second = before["rounds"]
    check_same(tmp_path, before | {"rounds": [first, second, second]})
    check_same(tmp_path, before | {"rounds": [first]})
    others = {
        "other seeds": {"rounds": [first, {"seed": 1, "learns": True}]},  # two seeds, where there was one twice
        "another commit": {"git": {"commit": "b"}},
        "other data": {"data": {"examples": 8}},
        "another machine": {"machine": {}},
        "other versions": {"versions": {}},
    }
    for what, change in others.items():
        with pytest.raises(PacktrainError, match=f"contains runs of {what}"):
            check_same(tmp_path, before | change)
    held_out = {"rounds": [{"seed": 3, "learns": True}], "data": {"examples": 9, "tokens": 8}}  # of another first seed
    with pytest.raises(PacktrainError, match="contains runs of other seeds"):
        check_same(tmp_path, before | held_out)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"repeat": 2}, "did you mean repeats"),
        ({"repeats": 0}, "above 0"),
        ({"repeats": "many"}, "a whole number"),
        ({"ranks": 0}, "above 0"),
        ({"rank": 2}, "did you mean ranks"),
        ({"reference": "pad_longst"}, "did you mean pad_longest"),
        ({"variants": ["pad_longest", "balancd"]}, "did you mean balanced"),
        ({"variants": ["pad_longest", {"batching.max_tokens": 600}]}, "has no name"),
        ({"variants": ["pad_longest", {"name": "x" * 300}]}, "name is too long for a file"),
        ({"variants": ["pad_longest", "pad_longest"]}, "has two variants with this name"),
        ({"seeds": [0, 1, 0]}, "has a seed twice"),
        ({"variants": ["pad_longest", {"name": "x", "trainer": "trl:paddin"}]}, "did you mean trl:padding"),
        ({"variants": ["pad_longest", {"name": "x", "batching.max_tokns": 600}]}, "did you mean `max_tokens`"),
        ({"variants": ["pad_longest", {"name": "x", "batching.max_tokens": 5}]}, "an example may not fit"),
        ({"variants": ["pad_longest", "tests.nowhere:pairs"]}, "could not import the strategy"),
        ({"variants": ["pad_longest", "trl:paddin"]}, "did you mean trl:padding"),
        ({"base": "nowhere.yaml"}, "no such recipe"),
        ({"base": None}, "must be text"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, expected):
    with pytest.raises(RecipeError) as caught:
        load_experiment(write_experiment(tmp_path, **changes))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("key", "fix"), [("base", "compare RECIPE"), ("reference", "the variant"), ("variants", "[pad_")]
)
def test_a_key_that_is_needed_and_not_there_has_a_fix(tmp_path, key, fix):
    file = write_experiment(tmp_path)
    file.write_text("".join(line for line in file.open() if not line.startswith(f"{key}:")))
    with pytest.raises(RecipeError) as caught:
        load_experiment(file)
    (problem,) = caught.value.problems
    assert problem.key == key and problem.what == "is missing" and fix in problem.fix


def test_a_name_that_stands_twice_is_said_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_experiment(write_experiment(tmp_path, variants=["pad_longest", "balanced", "balanced"]))
    assert [problem.value for problem in caught.value.problems] == ["balanced"]


def test_a_trainer_that_is_not_installed_is_an_error_before_the_first_run(tmp_path, monkeypatch):
    file = write_experiment(tmp_path, variants=["pad_longest", "trl:padding"])
    load_experiment(file)
    monkeypatch.setitem(sys.modules, "trl", None)  # as where the extra `compare` is not installed
    with pytest.raises(RecipeError) as caught:
        load_experiment(file)
    assert "needs trl" in str(caught.value) and "packtrain[compare]" in str(caught.value)


def test_a_problem_names_its_variant_and_every_problem_is_reported(tmp_path):
    variants = ["pad_longest", {"name": "x", "batching.max_tokns": 1}, {"name": "y", "training.learning_rat": 1}]
    with pytest.raises(RecipeError) as caught:
        load_experiment(write_experiment(tmp_path, variants=variants))
    places = [problem.where for problem in caught.value.problems]
    assert len(places) == 2 and "variant x" in places[0] and "variant y" in places[1]


def test_a_stored_recipe_tells_no_path_of_this_machine(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    experiment = load_experiment(write_experiment(tmp_path), [f"data.path={data}", "data.num_rows=20"])
    stored = json.dumps(portable(with_settings(experiment.variants[0].recipe, output_dir=str(tmp_path))))
    assert str(tmp_path) not in stored and '"path": "rows.jsonl"' in stored


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("gsm8k/train.jsonl", "gsm8k/train.jsonl"),
        ("./train.jsonl", "train.jsonl"),
        ("../someone/train.jsonl", "train.jsonl"),
        ("/home/someone/train.jsonl", "train.jsonl"),
    ],
)
def test_a_path_is_shown_as_given_only_where_it_tells_nothing(given, shown):
    assert shown_path(given) == shown


def test_the_same_data_in_another_place_are_the_same_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_experiment(tmp_path)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text('{"text": "a"}\n')
    here, there = (load_experiment(path, [f"data.path={folder}/rows.jsonl"]) for folder in ("here", "there"))
    assert portable(here.of_reference.recipe)["data"]["path"] == "here/rows.jsonl"
    assert here.hash == there.hash != load_experiment(path, ["data.path=other.jsonl"]).hash


@pytest.mark.parametrize("name", ["quickstart", "long_tail", "gsm8k", "gpu_sft", "ibm_packing", "two_ranks"])
def test_shipped_comparisons_are_valid(name):
    path = Path(__file__).parents[2] / "recipes" / "compare" / f"{name}.yaml"
    experiment = load_experiment(path, ["data.path=train.jsonl"])
    assert experiment.reference in {variant.name for variant in experiment.variants}
    assert any(
        variant.trainer == "packtrain" and variant.recipe.batching.strategy == "balanced"
        for variant in experiment.variants
    )


@pytest.mark.parametrize("where", ["path", "eval_path", "mixture"])
def test_no_path_of_a_list_or_a_mixture_shows_this_machine(where, tmp_path):
    paths = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b/*.jsonl", "org/name"]
    value = [{"path": paths, "weight": 1}, {"path": paths[0], "weight": 1}] if where == "mixture" else paths
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{model_name_or_path: m}}\ndata: {json.dumps({'path': 'c.jsonl'} | {where: value})}\n"
        "training: {output_dir: x}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.path=null"] if where == "mixture" else [])
    assert str(tmp_path) in json.dumps(recipe.to_dict())
    stored = portable(recipe)["data"]
    assert str(tmp_path) not in json.dumps(stored)
    shown = stored["mixture"][0]["path"] if where == "mixture" else stored[where]
    assert shown == ["a.jsonl", "*.jsonl", "org/name"]


def test_every_key_of_a_comparison_is_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["keys", "compare"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert MEANINGS.keys() == KEYS.keys() and all(key in shown for key in KEYS) and "seeds x repeats" in shown


def test_fewer_updates_than_asked_are_said(tmp_path):
    """Control: where the recipe has no limit, a comparison of it makes as many as it says."""
    path = write_experiment(tmp_path).parent / "base.yaml"
    text = describe(load_experiment(path, ["max_steps=8"]))
    assert "8 updates each (training.max_steps, fewer than the 12 of warmup_steps + measure_steps; 6 are timed)" in text
    assert describe(load_experiment(path)).endswith("3 rounds, 12 updates each")
    assert describe(load_experiment(path), kept=4).endswith("12 updates each; 4 of 15 runs are finished and kept")
