"""Prunes the training examples: keeps a share of them, by a score of each or at random.

    data.keep: {by: el2n, share: 0.7, which: high, scores: out/scores.parquet}

    el2n    .2 .9 .4 .7 .1     share 0.4     high      .9 .7
                                             low       .2 .1
                                             middle    .2 .4    (as many are left out below as above, or one fewer)

The hardest are kept by `high` (Paul et al. 2021, Deep Learning on a Data Diet, https://arxiv.org/abs/2107.07075), the
middle by perplexity in Marion et al. 2023 (When Less is More, https://arxiv.org/abs/2309.04564). Held-out examples are
not pruned. The examples keep their order, and their fingerprint is that of the kept ones, so that a run resumes only
with the same choice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.scores import read_scores
from packtrain.errors import DataError
from packtrain.recipe.sections import SCORES, KeepSection

_KEPT = 0x6B657074  # "kept": keeps this draw apart from others of the same seed
_WORDS = {"high": "highest", "low": "lowest", "middle": "middle"}


def prune(keep: KeepSection, examples: Examples, *, seed: int) -> Examples:
    """Returns the examples that are kept; their report says how many are, and how many are left out.

    Args:
        examples: all training examples, without those held out.
        seed: of a random choice that has no seed of its own.

    Raises:
        DataError: the share is all or nothing of them, or the scores can't be read or are of other examples.
    """
    total = len(examples)
    count = round(keep.share * total)
    if not 0 < count < total:
        what = f"keeps {count:,} of {total:,} training examples"
        raise DataError(what, key="data.keep.share", value=keep.share, fix="raise it" if not count else "lower it")
    if keep.by not in SCORES:
        drawn = seed if keep.seed is None else keep.seed
        kept = np.random.default_rng([_KEPT, drawn]).permutation(total)[:count]
        how = f"chosen at random by seed {drawn}"
    else:
        which, scores = keep.which or "high", read_scores(Path(keep.scores or "").expanduser(), keep.by, examples)
        kept = choose(scores, count, which)
        how = f"those with the {_WORDS[which]} {keep.by}, from {scores[kept].min():.4g} to {scores[kept].max():.4g}"
    note = f"kept {count:,} of {total:,} training examples ({how}); {total - count:,} are left out (data.keep)"
    return examples.take(np.sort(kept), note=note)


def choose(scores: np.ndarray, count: int, which: str) -> np.ndarray:
    """Chooses `count` examples by their scores, `[n]`; of equal scores, the earlier example counts as the lower one.

    >>> choose(np.array([0.2, 0.9, 0.4, 0.7, 0.1]), 2, "high").tolist()
    [3, 1]
    >>> choose(np.array([0.2, 0.9, 0.4, 0.7, 0.1]), 2, "middle").tolist()
    [0, 2]
    """
    order = np.argsort(scores, kind="stable")
    first = {"low": 0, "middle": (len(scores) - count) // 2, "high": len(scores) - count}[which]
    return order[first : first + count]
