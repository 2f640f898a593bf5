"""GRPO: DDPO's policy gradient with advantages over the candidates of a prompt (arXiv 2402.03300)."""

import dataclasses

from dpo_jax.methods.ddpo import DDPO

GRPO = dataclasses.replace(
    DDPO,
    name="grpo",
    title="policy gradients with group advantages",
    paper="2402.03300",
    sets={"online.advantage": "group", "online.candidates": 4},
)
