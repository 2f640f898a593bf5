"""Which stored scores of pairs a run reads, for weights of pairs and for a curriculum."""

from ml_collections import ConfigDict

from dpo_jax.errors import UserError
from dpo_jax.training.defaults import method_of


def score_judge(config: ConfigDict) -> str:
    """Return the judge whose scores of pairs the run reads; "" if it reads none.

    Raises:
        UserError: no judge is named, or one without use, or the method does not learn from pairs.
    """
    data, method = config.data, method_of(config)
    readers = {"pair_weights": "none", "order": "shuffled"}
    field = next((name for name, without in readers.items() if data[name] != without), "")
    if not field:
        if data.score_judge:
            raise UserError(
                f"config.data.score_judge={data.score_judge} has no effect: only data.pair_weights and "
                "data.order=curriculum read scores of pairs. Set one of them, or remove data.score_judge"
            )
        return ""
    why = f"config.data.{field}={data[field]} compares the scores of two images"
    if method.learns_from not in ("pairs", "lists"):
        raise UserError(f"{why}, but {config.loss.name} learns from {method.unit}. Set data.{field}={readers[field]}")
    if data.pair_weights != "none" and data.batch_size == 1:
        raise UserError(
            f"config.data.pair_weights={data.pair_weights} weighs the pairs of an optimizer step against each other, "
            "but config.data.batch_size=1. Set a larger batch_size"
        )
    if not data.score_judge and len(data.judges) != 1:
        raise UserError(
            f"{why}, but no judge is named. Set data.score_judge to the name of scores that python -m dpo_jax.score "
            f"--data={data.path} stored, for example pickscore"
        )
    return data.score_judge or data.judges[0]
