"""SPO: a judge compares what each candidate of a step promises, and D3PO's loss trains on it (arXiv 2406.04314)."""

import dataclasses

from dpo_jax.fields import Field
from dpo_jax.methods.d3po import D3PO

SPO = dataclasses.replace(
    D3PO,
    name="spo",
    title="SPO",
    paper="2406.04314",
    fields={"beta": Field(10.0, "Strength of the pull towards the reference.", above=0)},
    sets={"online.branching": True, "online.best_and_worst": True, "online.candidates": 4},
)
"""Step-aware preference optimization: any judge, of the image that each candidate promises.

The released code (https://github.com/RockeyCoss/SPO) judges by a PickScore that was trained on noisy images; trains at
a rate of 6e-5 from the fifth of 20 steps on, as `configs/d3po.py:spo` does; drops nearly tied pairs, with a PickScore
`online.margin=0.3`; and shuffles the steps of 10 prompts into updates of 10 pairs, where an update here has all steps
of `data.batch_size` prompts.
"""
