"""What is learnt. A new objective is a file in this folder and a line in `OBJECTIVES`.

Its class holds its keys of a recipe's section `objective:` and answers for everything a run asks about them; see
`objective.py`. These files import torch only where something is computed, so that recipes are read without it.
"""

from packtrain.objectives.block_diffusion import BlockDiffusion
from packtrain.objectives.causal import CausalLM
from packtrain.objectives.masked_diffusion import MaskedDiffusion
from packtrain.objectives.masked_lm import MaskedLM
from packtrain.objectives.objective import Objective
from packtrain.objectives.preference import Preference
from packtrain.objectives.reward import Reward
from packtrain.objectives.sequence_classification import SequenceClassification
from packtrain.objectives.several_answers import SeveralAnswers
from packtrain.objectives.token_classification import TokenClassification

OBJECTIVES: dict[str, type[Objective]] = {
    "causal_lm": CausalLM,
    "masked_diffusion": MaskedDiffusion,
    "block_diffusion": BlockDiffusion,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "masked_lm": MaskedLM,
    "several_answers": SeveralAnswers,
    "preference": Preference,
    "reward": Reward,
}
DEFAULT = "causal_lm"
