"""Looking into a trained model, and changing it: ablation, patching, the logit lens, attribution, statistics of heads."""

from transformer.interpret.interventions.ablation import Ablation, Importance, ablate, head_importance
from transformer.interpret.interventions.attribution import Attribution, attribute
from transformer.interpret.interventions.lens import Lens, logit_lens
from transformer.interpret.interventions.patching import Patching, patch
from transformer.interpret.interventions.statistics import HeadStatistics, head_statistics, induction_scores
from transformer.interpret.interventions.subject import (
    Inputs,
    Subject,
    encoder_inputs,
    next_token_inputs,
    pair_inputs,
)

__all__ = [
    "Ablation", "Attribution", "HeadStatistics", "Importance", "Inputs", "Lens", "Patching", "Subject", "ablate", "attribute",
    "encoder_inputs", "head_importance", "head_statistics", "induction_scores", "logit_lens", "next_token_inputs", "pair_inputs",
    "patch",
]  # fmt: skip
