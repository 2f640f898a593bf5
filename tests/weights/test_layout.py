"""Names and axes between our parameters and checkpoints."""

import numpy as np
import pytest

from dpo_jax.weights.layout import ParamSpec, flax_aliases, from_flax, from_torch, to_torch, torch_aliases, torch_name

LINEAR = ParamSpec((4, 6), (1, 0))
CONV = ParamSpec((3, 5, 2, 4), (3, 2, 0, 1))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("down_blocks.0.resnets.1.conv1.kernel", "down_blocks.0.resnets.1.conv1.weight"),
        ("conv_norm_out.scale", "conv_norm_out.weight"),
        ("text_model.embeddings.token_embedding.embedding", "text_model.embeddings.token_embedding.weight"),
        ("time_embedding.linear_1.bias", "time_embedding.linear_1.bias"),
    ],
)
def test_torch_name(ours: str, theirs: str) -> None:
    assert torch_name(ours) == theirs


@pytest.mark.parametrize(
    ("ours", "old"),
    [
        ("encoder.mid_block.attentions.0.to_q.kernel", "encoder.mid_block.attentions.0.query.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid_block.attentions.0.proj_attn.bias"),
        ("text_model.final_layer_norm.scale", "final_layer_norm.weight"),
    ],
)
def test_torch_aliases(ours: str, old: str) -> None:
    assert torch_aliases(ours) == [torch_name(ours), old]


@pytest.mark.parametrize(
    ("ours", "flax"),
    [
        (
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.kernel",
            "up_blocks_1.attentions_0.transformer_blocks_0.attn1.to_out_0.kernel",
        ),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias",
         "mid_block.attentions_0.transformer_blocks_0.ff.net_0.proj.bias"),
        ("time_embedding.linear_1.kernel", "time_embedding.linear_1.kernel"),
        ("decoder.mid_block.attentions.0.to_out.0.kernel", "decoder.mid_block.attentions_0.proj_attn.kernel"),
        ("text_model.encoder.layers.0.mlp.fc1.kernel", "text_model.encoder.layers.0.mlp.fc1.kernel"),
    ],
)  # fmt: skip
def test_flax_aliases(ours: str, flax: str) -> None:
    assert flax in flax_aliases(ours)


@pytest.mark.parametrize("spec", [LINEAR, CONV])
def test_to_torch_undoes_from_torch(spec: ParamSpec) -> None:
    ours = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    theirs = to_torch(ours, spec)
    assert theirs.shape == spec.torch_shape
    np.testing.assert_array_equal(from_torch(theirs, spec), ours)


def test_linear_layers_stored_as_1x1_convolutions() -> None:
    ours = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(from_torch(ours.T[:, :, None, None], LINEAR), ours)
    np.testing.assert_array_equal(from_flax(ours[None, None], LINEAR), ours)


def test_another_shape_is_refused_even_with_as_many_numbers() -> None:
    with pytest.raises(ValueError, match=r"stored as \(4, 6\), the model needs \(6, 4\)"):
        from_torch(np.zeros((4, 6)), LINEAR)
    with pytest.raises(ValueError, match=r"stored as \(24,\)"):
        from_flax(np.zeros(24), LINEAR)
