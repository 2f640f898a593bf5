"""Monitors of a run: rises over the reference, drift, noise levels, and norms by group of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import LossInputs
from dpo_jax.methods.metrics import BY_NOISE, pair_metrics, sums_by_noise
from dpo_jax.training.figures import figures_of, is_by_noise, mean_of, validation_figures
from dpo_jax.training.step import gradient_norms


def inputs_at(log_snr, winner, *, weight=None, with_reference=True) -> LossInputs:
    B = len(log_snr)
    error_BK = jnp.stack([jnp.array(winner), jnp.full(B, 0.4)], axis=1)
    reference_BK = jnp.full((B, 2), 0.2) if with_reference else None
    return LossInputs(
        log_ratio_BK=-(error_BK - 0.2) / 2,
        error_BK=error_BK,
        reference_error_BK=reference_BK,
        drift_BK=jnp.full((B, 2), 0.05) if with_reference else None,
        weight_B=jnp.ones(B) if weight is None else jnp.array(weight),
        log_snr_B=jnp.array(log_snr),
    )


def step_means(inputs: LossInputs) -> dict[str, np.ndarray]:
    numbers, weight = pair_metrics(inputs), inputs.weight_B.sum()
    sums = {name: (value * inputs.weight_B).sum() for name, value in numbers.items()}
    return {name: np.asarray(total / weight) for name, total in (sums | sums_by_noise(numbers, inputs)).items()}


def test_rises_are_shares_of_the_references_error() -> None:
    figures = figures_of(step_means(inputs_at([1.0, 1.0], [0.2, 0.24])))
    assert figures["error/winner_rise"] == pytest.approx(0.1, rel=1e-5)
    assert figures["error/loser_rise"] == pytest.approx(1.0, rel=1e-5)
    assert figures["error/drift"] == pytest.approx(0.25, rel=1e-5)
    assert figures["error/winner"] == pytest.approx(0.22, rel=1e-5)


def test_a_noise_level_is_the_mean_of_its_own_prompts_over_all_steps() -> None:
    """One step draws two prompts of little noise; another one of little and one of pure noise."""
    steps = [inputs_at([3.0, 0.5], [0.2, 0.3]), inputs_at([2.0, -np.inf], [0.7, 0.1])]
    figures = figures_of(mean_of([step_means(step) for step in steps]))
    assert figures["error/winner/noise_1"] == pytest.approx(0.4, rel=1e-5)
    assert figures["error/winner_rise/noise_1"] == pytest.approx(1.0, rel=1e-5)
    assert figures["error/winner/noise_4"] == pytest.approx(0.1, rel=1e-5)
    assert figures["pair/accuracy/noise_4"] == 1
    assert not [name for name in figures if name.endswith(("noise_2", "noise_3"))], "no prompt was drawn there"
    assert not [name for name in figures if BY_NOISE in name]


def test_a_prompt_without_weight_is_in_no_noise_level() -> None:
    figures = figures_of(step_means(inputs_at([1.0, -3.0, -3.0], [0.2, np.inf, 0.3], weight=[1.0, 0.0, 1.0])))
    assert np.isnan(figures["error/winner"])  # as the loss is
    assert figures["error/winner/noise_1"] == pytest.approx(0.2)


def test_without_a_reference_there_are_errors_by_noise_but_no_rises() -> None:
    figures = validation_figures(step_means(inputs_at([1.0], [0.3], with_reference=False)))
    assert figures["validation/error_winner_noise_1"] == pytest.approx(0.3)
    assert {name for name in figures if not is_by_noise(name)} == {
        *("validation/error_winner", "validation/error_loser", "validation/pair_accuracy", "validation/reward_margin")
    }


def test_images_that_the_model_drew_have_no_noise_levels() -> None:
    assert sums_by_noise({"pair/accuracy": jnp.ones(1)}, LossInputs(jnp.zeros((1, 2)), weight_B=jnp.ones(1))) == {}


def test_gradient_norms_of_groups_add_up() -> None:
    names = [
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.kernel",
        "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.kernel",
        "mid_block.resnets.0.conv1.kernel",
        "mid_block.resnets.0.time_emb_proj.kernel",
        "conv_in.bias",
        "something.else",
    ]
    grads = {name: jnp.full((i + 1,), 2.0) for i, name in enumerate(names)}
    norms = gradient_norms(grads)
    squares = {name.partition("/")[2]: round(float(norm) ** 2) for name, norm in norms.items()}
    assert squares == {"attention": 4, "feed_forward": 8, "convolutions": 12 + 20, "embeddings": 16, "other": 24}
    assert gradient_norms({names[0]: grads[names[0]]}) == {}, "it would repeat the norm of the whole gradient"


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (
            "attention",
            ("transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn2.to_q", "layers.1.attention.to_q"),
        ),
        (
            "feed_forward",
            (
                *("transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff_context.net.0.proj"),
                *("single_transformer_blocks.2.proj_mlp", "single_transformer_blocks.2.proj_out"),
                "noise_refiner.0.feed_forward.w1",
            ),
        ),
        (
            "modulation",
            (
                *("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear", "norm_out.linear"),
                *("single_transformer_blocks.2.norm.linear", "layers.1.adaLN_modulation.0"),
                "all_final_layer.2-1.adaLN_modulation.1",
            ),
        ),
        (
            "embeddings",
            ("pos_embed.proj", "time_text_embed.guidance_embedder.linear_1", "cap_embedder.1", "x_embedder"),
        ),
        ("other", ("proj_out", "all_final_layer.2-1.linear", "x_pad_token")),
    ],
)
def test_layers_of_transformers_are_in_the_groups_of_their_kind(group: str, names: tuple[str, ...]) -> None:
    grads = {f"{name}.kernel": jnp.ones(1) for name in names}
    norms = gradient_norms(grads | {"mid_block.resnets.0.conv1.kernel": jnp.ones(1)})
    assert norms.keys() == {f"gradient_norm/{group}", "gradient_norm/convolutions"}


def test_monitors_add_no_product_to_the_step() -> None:
    inputs = inputs_at([1.0, -1.0], [0.2, 0.3])
    jaxpr = str(jax.make_jaxpr(lambda inputs: sums_by_noise(pair_metrics(inputs), inputs))(inputs))
    assert "dot_general" not in jaxpr
    assert "conv" not in jaxpr.replace("convert", "")
