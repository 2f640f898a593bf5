"""InPO is DPO with inverted latents: its fields, what does not go with them, and what they cost."""

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.batch import Conditioning
from dpo_jax.cli import replaced
from dpo_jax.errors import UserError
from dpo_jax.planning.estimate import measure_work
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.program import Program
from dpo_jax.training.config import check
from dpo_jax.training.defaults import choose_method


def test_choosing_it_turns_inversion_on_and_choosing_another_method_turns_it_off(tiny_config):
    config = tiny_config("sd15", **{"loss.name": "inpo"})
    assert (config.loss.inversion_steps, config.loss.beta) == (10, 2000.0)
    choose_method(config, "dpo")
    assert config.loss.inversion_steps == 0
    check(tiny_config("sd15", **{"loss.name": "mapo", "loss.inversion_steps": 5}))  # any method can have it


@pytest.mark.parametrize("field", ["noise_offset", "input_perturbation"])
def test_noise_that_is_not_drawn_cannot_be_changed(tiny_config, field):
    with pytest.raises(UserError, match=rf"loss.{field}=0.1 changes how noise is drawn, but .*inversion_steps=10"):
        check(tiny_config("sd15", **{"loss.name": "inpo", f"loss.{field}": 0.1}))


def test_a_plan_counts_one_evaluation_of_the_policy_per_step_and_no_memory(tiny_config):
    config = tiny_config("sd15")
    pipeline = open_structure(config)
    x_NHWC, context_NLD = jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, pipeline.text_lengths[0], 32))
    arguments = pipeline.denoiser.specs, x_NHWC, jnp.zeros(2, jnp.int32), Conditioning(context_NLD)
    shapes = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in arguments[0].items()}
    forward = Program(jax.make_jaxpr(pipeline.denoise)(shapes, *arguments[1:])).flops()
    without, with_steps = (measure_work(replaced(config, {"loss.inversion_steps": steps}), "gpu") for steps in (0, 3))
    assert with_steps.flops - without.flops == pytest.approx(3 * forward)
    assert with_steps.model_flops - without.model_flops == pytest.approx(3 * forward)
    assert with_steps.activation_bytes < 1.01 * without.activation_bytes, "nothing of it is kept for a gradient"
