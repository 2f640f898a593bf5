"""Numbers to watch while training, one per prompt.

Axes: B prompts, K candidates of a prompt, best first.
"""

import jax

from dpo_jax.batch import LossInputs
from dpo_jax.objectives.preferences import implicit_accuracy, margin

Metrics = dict[str, jax.Array]


def pair_metrics(inputs: LossInputs, **fields: float) -> Metrics:
    """Return the errors of the best and worst candidate and, if there are two, accuracy and margin."""
    metrics = {"error/winner": inputs.error_BK[:, 0]}
    if inputs.error_BK.shape[1] > 1:
        metrics["error/loser"] = inputs.error_BK[:, -1]
        metrics["pair/accuracy"] = implicit_accuracy(inputs.log_ratio_BK)
        metrics["reward/margin"] = margin(inputs.log_ratio_BK)
    if inputs.reference_error_BK is not None:
        metrics["error/reference_winner"] = inputs.reference_error_BK[:, 0]
        if inputs.error_BK.shape[1] > 1:
            metrics["error/reference_loser"] = inputs.reference_error_BK[:, -1]
    return metrics
