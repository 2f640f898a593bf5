"""Judges of pictures: functions `(images_NHWC uint8, prompts) -> scores_N`, higher is better."""

from dpo_jax.rewards import shapes

REWARDS = {"shapes": shapes.score}
