"""The loss types by name, and what is to be known of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from oarsmith.losses.preference import functions
from oarsmith.losses.preference.pairs import Options, Pairs, WholeStep


@dataclass(frozen=True)
class LossType:
    """A loss of pairs.

    Attributes:
        function: see ``functions.py``; None: nothing but the NLL of the chosen answers.
        formula, paper: for people (``docs/alignment.md`` has the notation; papers by their arXiv number).
        reference: whether it compares with a reference.
        averaged: log-probabilities per token, not of the whole answer.
        divergences: whether f-divergences other than the reverse KL make sense (Z(x) must cancel).
        of_step: whether a pair's loss depends on the step's other pairs.
        nll: the weight of the chosen answers' NLL that belongs to it, unless another one is asked for.
    """

    function: Callable[[Pairs, Options, WholeStep], Tensor] | None
    formula: str
    paper: str
    reference: bool = True
    averaged: bool = False
    divergences: bool = False
    of_step: bool = False
    nll: float = 0.0


LOSS_TYPES: Mapping[str, LossType] = {
    "sigmoid": LossType(functions.sigmoid, "-(1-e) log s(b z) - e log s(-b z)", "DPO 2305.18290", divergences=True),
    "sigmoid_norm": LossType(
        functions.sigmoid_norm,
        "-log s(b z), z of log-ratios per token",
        "Tulu 3 2411.15124",
        averaged=True,
        divergences=True,
    ),
    "robust": LossType(
        functions.robust, "(e log s(-b z) - (1-e) log s(b z)) / (1 - 2e)", "robust DPO 2403.00409", divergences=True
    ),
    "hinge": LossType(functions.hinge, "max(0, 1 - b z)", "SLiC 2305.10425", divergences=True),
    "ipo": LossType(
        functions.ipo, "(z - 1/(2b))^2, z of log-ratios per token", "IPO 2310.12036", averaged=True, divergences=True
    ),
    "exo_pair": LossType(
        functions.exo_pair,
        "s(b z) (log s(b z) - log(1-e)) + s(-b z) (log s(-b z) - log e)",
        "EXO 2402.00856",
        divergences=True,
    ),
    "discopop": LossType(
        functions.discopop, "-log s(b z) s(-b z/tau) + exp(-b z) s(b z/tau)", "DiscoPOP 2406.08414", divergences=True
    ),
    "dpop": LossType(functions.dpop, "-log s(b (z - lambda max(0, -r_c)))", "Smaug 2402.13228"),
    "dpop_added": LossType(functions.dpop_added, "-log s(b z) + lambda max(0, -r_c)", "Smaug 2402.13228"),
    "kto_pair": LossType(
        functions.kto_pair, "(s(-b (r_c - KL_r)) + s(-b (KL_c - r_r))) / 2", "KTO 2402.01306", of_step=True
    ),
    "bco_pair": LossType(functions.bco_pair, "-log s(b r_c - d) - log s(d - b r_r)", "BCO 2404.04656"),
    "nca_pair": LossType(functions.nca_pair, "-log s(b r_c) - log s(-b r_c) / 2 - log s(-b r_r) / 2", "NCA 2402.05369"),
    "sppo_hard": LossType(functions.sppo_hard, "(r_c - 1/(2b))^2 + (r_r + 1/(2b))^2", "SPPO 2405.00675"),
    "apo_zero": LossType(functions.apo_zero, "s(-b r_c) + s(b r_r)", "APO 2408.06266"),
    "apo_down": LossType(functions.apo_down, "s(b r_c) + s(-b z)", "APO 2408.06266"),
    "aot": LossType(
        functions.aot, "-log s(b x), x: sorted margins, policy's less the reference's", "AOT 2406.05882", of_step=True
    ),
    "aot_unpaired": LossType(
        functions.aot_unpaired,
        "-log s(b x), x: sorted log-ratios, chosen less rejected",
        "AOT 2406.05882",
        of_step=True,
    ),
    "simpo": LossType(
        functions.simpo, "-log s(b (p_c - p_r) - gamma)", "SimPO 2405.14734", reference=False, averaged=True
    ),
    "cpo": LossType(functions.cpo, "-log s(b (pi_c - pi_r)) + NLL", "CPO 2401.08417", reference=False, nll=1.0),
    "or": LossType(
        functions.odds_ratio,
        "-log s(p_c - p_r - log(1 - e^p_c) + log(1 - e^p_r))",
        "ORPO 2403.07691",
        reference=False,
        averaged=True,
    ),
    "orpo": LossType(functions.orpo, "b times or's + NLL", "ORPO 2403.07691", reference=False, averaged=True, nll=1.0),
    "sft": LossType(None, "NLL", "RPO 2404.19733", reference=False, nll=1.0),
}
# Other names for the same.
ALIASES: Mapping[str, str] = {"aot_pair": "aot"}
