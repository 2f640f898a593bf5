"""A field that does not exist is answered with the one that was meant."""

import pytest

from dpo_jax.cli import flatten, load_config
from dpo_jax.nearest import nearest, nearest_field


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learnin_rate", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("bs", "data.batch_size"),
        ("batch", "data.batch_size"),
        ("optimizer.batch_size", "data.batch_size"),
        ("epochs", "steps"),
        ("max_train_steps", "steps"),
        ("data.seed", "seed"),
        ("random_seed", "seed"),
        ("beta", "loss.beta"),
        ("loss.betta", "loss.beta"),
        ("lora.r", "lora.rank"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("max_grad_norm", "optimizer.clip_norm"),
        ("sample.cfg_scale", "sample.guidance"),
        ("setps", "steps"),
        ("prompts", "sample.prompts"),
        ("save_every", "checkpoint.every"),
        ("data.resolutoin", "data.resolution"),
        ("frobnicate", None),
    ],
)
def test_the_field_that_was_meant(field, meant):
    assert nearest_field(field, flatten(load_config("tiny"))) == meant


def test_a_field_of_this_config_comes_before_a_synonym():
    assert nearest_field("epochs", flatten(load_config("tiny_online"))) == "online.epochs"
    assert nearest_field("online.cfg", flatten(load_config("tiny_online"))) == "online.guidance"


def test_the_name_that_was_meant():
    assert nearest("trian", ["train", "sample"]) == " Did you mean train?"
    assert nearest("xyz", ["train", "sample"]) == ""
