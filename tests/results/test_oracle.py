"""The exact denoiser against brute force, and the law it shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from results.rainbow.oracle import World, decode, exact_denoiser, length_prior, run_file, run_grid
from results.rainbow.run import HERE, main, write_oracle


def world(tail: str, pads: int, ambiguity: int, *, canvas: int = 32, prior: np.ndarray | None = None) -> World:
    prior = length_prior() if prior is None else prior
    return World(prior=prior, ambiguity=ambiguity, tail=tail, pads=pads, canvas=canvas)


def all_answers(w: World):
    """(probability, length, tokens) of everything that can stand on the canvas."""
    for length, probability in enumerate(w.prior, start=1):
        behind = w.canvas - length - 1
        fills = {
            "eos": [(w.eos,) * behind],
            "single": [(w.eos + 1,) * behind],
            "void": [(w.eos + 1,) * behind],
            "rainbow": [tuple(w.eos + 1 + i % max(w.pads, 1) for i in range(behind))],
            "random": list(itertools.product(range(w.eos + 1, w.mask), repeat=behind)),
        }[w.tail]
        words = list(itertools.product(range(w.ambiguity), repeat=length))
        for word, fill in itertools.product(words, fills):
            yield probability / len(words) / len(fills), length, (*word, w.eos, *fill)


@pytest.mark.parametrize(("tail", "pads"), [("eos", 0), ("single", 1), ("rainbow", 2), ("random", 2), ("void", 1)])
def test_the_denoiser_is_exact(tail, pads):
    """Marginals of every reachable kind of canvas, counted over all answers."""
    w = world(tail, pads, ambiguity=2, canvas=5, prior=np.array([0.5, 0.3, 0.2]))
    predict, answers = exact_denoiser(w), list(all_answers(w))
    assert sum(p for p, _, _ in answers) == pytest.approx(1)
    checked = 0
    for _, true_length, tokens in answers[::3]:
        for kept in itertools.product((False, True), repeat=w.canvas):
            seen = [token if keep else w.mask for token, keep in zip(tokens, kept, strict=True)]
            prefix = next((i for i, token in enumerate(seen) if token >= w.ambiguity), w.canvas)
            counts = np.zeros((w.canvas, w.mask))
            for p, length, other in answers:
                agrees = all(s in (w.mask, t) for s, t in zip(seen, other, strict=True))
                told = length == true_length if prefix == true_length else length > prefix
                if agrees and told:
                    counts[np.arange(w.canvas), other] += p
            expected = counts / counts.sum(axis=1, keepdims=True)
            got = predict(torch.tensor([true_length - 1]), torch.tensor([seen]), 0, w.canvas).exp()[0]
            masked = [not keep for keep in kept]
            np.testing.assert_allclose(got[masked], expected[masked], atol=1e-9)
            checked += 1
    assert checked > 100


def test_the_prior():
    prior = length_prior()
    assert prior.sum() == pytest.approx(1) and prior[0] == pytest.approx(0.114, abs=0.001)
    for mean in (3.0, 5.84, 10.0):
        assert length_prior(mean=mean) @ np.arange(1, 29) == pytest.approx(mean, abs=1e-9), "also where it is cut"
    odds = prior[1:] / prior[:-1] * np.arange(1, 28) / (np.arange(1, 28) + 0.5)
    assert np.ptp(odds) < 1e-9, "a negative binomial of shape 1.5: one ratio throughout"


@pytest.mark.parametrize("tail", [("eos", 0), ("single", 1), ("rainbow", 3), ("rainbow", 7), ("void", 1)])
def test_without_ambiguity_every_tail_is_fine(tail):
    assert decode(world(*tail, ambiguity=1)).exact == pytest.approx(1)


def test_one_tail_token_collapses_and_more_than_the_ambiguity_do_not():
    """B = 3: eos and a single pad end at once, K = 3 too, K = 7 does not."""
    eos, single, three, seven = (
        decode(world(*tail, ambiguity=3)) for tail in (("eos", 0), ("single", 1), ("rainbow", 3), ("rainbow", 7))
    )
    for collapsed in (eos, single, three):
        assert collapsed.exact < 0.15 and collapsed.mean_length <= 2 and collapsed.early > 0.7
    assert seven.exact > 0.99 and seven.mean_length == pytest.approx(seven.true_mean_length, abs=0.02)


def test_a_banned_tail_is_never_written_and_leaves_the_end_as_the_surest_bet():
    """The same probabilities as a single pad's: fine at B = 3, until with B = 8 an end is surer than any wording."""
    void, single = (decode(world(tail, 1, ambiguity=3, canvas=64)) for tail in ("void", "single"))
    assert void.exact > 0.99 and single.exact < 0.15
    assert void.evaluations == pytest.approx(void.mean_length + 1, abs=0.01), "each token of the answer, and its end"
    assert single.evaluations > 60, "the tail comes first"
    many = decode(world("void", 1, ambiguity=8, canvas=64))
    assert many.exact < 0.2 and many.early > 0.7 and many.evaluations < 4


def test_more_room_does_not_help_a_single_tail():
    short, long = (decode(world("eos", 0, ambiguity=3, canvas=canvas)) for canvas in (32, 64))
    assert long.mean_length == short.mean_length == pytest.approx(1)


def test_it_is_deterministic_and_written_down(tmp_path):
    options = dict(ambiguities=(1, 2), rainbows=(3,), randoms=(), canvases=(30,))
    first, second = run_grid(**options), run_grid(**options)
    assert first == second
    write_oracle(first, tmp_path)
    table = (tmp_path / "oracle.md").read_text()
    assert "| eos | 1.00 / 5.84 / 6.8 | 0.24 / 1.89 / 30.0 |" in table
    assert "| rainbow K=3 | 1.00 / 5.84 / 6.8 | 1.00 / 5.84 / 6.8 |" in table
    assert "| void | 1.00 / 5.84 / 6.8 | 1.00 / 5.84 / 6.8 |" in table


def test_the_command_runs_the_grid_of_a_file_and_drops_no_setting(tmp_path, capsys):
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    grid = "{ambiguities: [2], rainbows: [3], randoms: [], canvases: [30]"
    path.write_text(grid + ", prompts: 4}\n")
    with pytest.raises(SystemExit) as ended:
        main(["--oracle", str(path), "--out", str(out)])
    assert ended.value.code == 2 and "prompts" in capsys.readouterr().err and not out.exists()
    path.write_text(grid + "}\n")
    main(["--oracle", str(path), "--out", str(out)])
    assert "| rainbow K=3 | 1.00 / 5.84 / 6.8 |" in (out / "oracle.md").read_text()


@pytest.mark.slow  # a minute
def test_the_stored_grid_comes_out_again_byte_for_byte(tmp_path):
    write_oracle(run_file(HERE / "oracle.yaml"), tmp_path)
    for name in ("oracle.json", "oracle.md"):
        assert (tmp_path / name).read_bytes() == (HERE / "oracle" / name).read_bytes()
