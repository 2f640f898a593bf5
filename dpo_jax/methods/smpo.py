"""SmPO: DPO whose pull on a pair grows with how clear its label is (arXiv 2506.02698)."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method
from dpo_jax.objectives.preferences import Scalar, margin


def smpo(inputs: LossInputs, *, beta: Scalar, label_scale: float) -> Float[Array, " B"]:
    """Return `-log sigmoid(beta label_scale (2 p - 1) margin)`, p being the winner's share of the preference.

    In the released code p is the softmax of both PickScores, scaled from 0.1154 ... 0.2820 to 0 ... 1, so that a
    typical 2 p - 1 is some hundredths; label_scale is 10 and beta, in our unit, 2000 for SD1.5 (which starts from a
    UNet after SFT) and 5000 for SDXL. Here p are the shares of the data set, `data.labels="soft"`: to train on
    PickScores, prepare them as labels. (The code takes the p of the first pair for the whole batch; here each has its
    own. Its x_t come from inverted DDIM, in 5 steps for SD1.5 and 10 for SDXL, each of which averages two predictions;
    here only with `loss.inversion_steps`, of one prediction per step.)
    """
    certainty_B = inputs.preference_BK[:, 0] - inputs.preference_BK[:, 1]
    return -jax.nn.log_sigmoid(beta * label_scale * certainty_B * margin(inputs.log_ratio_BK))


def problem(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the labels, which must be soft."""
    why = 'config.loss.name="smpo" weighs pairs by shares of votes, '
    if config["data.judges"]:
        return f'{why}but data.judges={config["data.judges"]} only order images. Set data.judges=(), or loss.name="dpo"'
    if config["data.labels"] != "soft":
        return f'{why}but data.labels={config["data.labels"]!r} leaves none. Set data.labels="soft", or loss.name="dpo"'
    return None


SMPO = Method(
    name="smpo",
    title="SmPO's soft weights",
    paper="2506.02698",
    loss=smpo,
    fields={
        "beta": Field(2000.0, "Strength of the pull towards the reference; published: 5000 for SDXL.", above=0),
        "label_scale": Field(10.0, "Factor of beta for a label without doubt, 2 p - 1 = 1.", above=0),
    },
    sets={"data.labels": "soft"},
    margin_scale="beta",
    reads_log_ratios_alone=True,
    problem=problem,
)
