"""Axes of parameters are split as rules say, their statistics likewise, and impossible meshes are refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.flux_transformer import FluxTransformer2DModel, FluxTransformerConfig
from dpo_jax.models.network import Network
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.z_image_transformer import ZImageTransformer2DModel, ZImageTransformerConfig
from dpo_jax.sharding import AXES, SMALL, TENSOR_RULES, Placement, make_mesh
from dpo_jax.weights.layout import ParamSpec
from dpo_jax.weights.quantised import QTYPES, quantised_shape

LINEAR, CONV, EMBEDDING = (1, 0), (3, 2, 0, 1), (0, 1)


def placed(shape, torch_axes, name="kernel", sizes=(1, 4, 1), **kwargs):
    return Placement(AbstractMesh(sizes, AXES), **kwargs)(name, ParamSpec(shape, torch_axes)).spec


@pytest.mark.parametrize(
    ("shape", "torch_axes", "axes"),
    [
        ((1280, 320), LINEAR, (None, "fsdp")),  # PyTorch's first axis, though the other is larger
        ((3, 3, 640, 320), CONV, (None, None, None, "fsdp")),
        ((49408, 768), EMBEDDING, ("fsdp",)),
        ((3, 3, 512, 510), CONV, (None, None, "fsdp")),
        ((1024, 770), LINEAR, ("fsdp",)),
        ((77, 1280), EMBEDDING, (None, "fsdp")),
        ((8, 512, 256, 6), CONV, (None, "fsdp")),  # the largest of the rest
        ((1023, 1023), LINEAR, ()),
        ((256, 128), LINEAR, ()),  # small
    ],
)
def test_splits_what_lies_together_on_disk(shape, torch_axes, axes):
    assert placed(shape, torch_axes) == PartitionSpec(*axes)


def test_copies_tables_that_are_not_trained():
    table = ParamSpec((1, 1024, 64), (0, 1, 2), is_trainable=False)
    assert Placement(AbstractMesh((1, 4, 1), AXES))("pos_embed.pos_embed", table).spec == PartitionSpec()


def test_copies_everything_where_nothing_is_to_be_split():
    assert placed((1280, 320), LINEAR, sizes=(4, 1, 1)) == PartitionSpec()


def test_rules_come_first_and_fsdp_takes_another_axis():
    to_q, to_out = "down_blocks.0.attentions.1.blocks.0.attn1.to_q.kernel", "mid_block.attn1.to_out.0.kernel"
    assert placed((320, 640), LINEAR, to_q, (2, 2, 2)) == PartitionSpec("fsdp", "tensor")
    assert placed((640, 320), LINEAR, to_out, (2, 2, 2)) == PartitionSpec("tensor", "fsdp")
    assert placed((320, 642), LINEAR, to_q, (1, 1, 4)) == PartitionSpec()  # 4 doesn't divide it
    assert placed((320, 640), LINEAR, to_q, (2, 4, 1)) == PartitionSpec(None, "fsdp")  # PyTorch's first axis again
    own = (("to_q", ("fsdp", None)), *TENSOR_RULES)
    assert placed((320, 640), LINEAR, to_q, (2, 2, 2), rules=own) == PartitionSpec("fsdp")
    with pytest.raises(
        ValueError, match=r"the rule 'to_q': \('fsdp',\) .* does not fit .*to_q.kernel of shape .*\. Give it 2"
    ):
        placed((320, 640), LINEAR, to_q, rules=(("to_q", ("fsdp",)),))
    with pytest.raises(ValueError, match=r"each None or one of data, fsdp, tensor"):
        placed((320, 640), LINEAR, to_q, rules=(("to_q", ("model", None)),))


def network(module, config):
    return Network.build(lambda rngs: module(config, dtype=jnp.float32, rngs=rngs), config)


@pytest.fixture(scope="module")
def networks():
    """Return UNets as published, and transformers as wide as published with few layers."""
    unets = {
        name: UNetConfig.from_dict(json.loads((PUBLISHED / name / "unet" / "config.json").read_text()), name)
        for name in ("sd15", "sdxl")
    }
    sd3 = SD3TransformerConfig(
        num_attention_heads=24, caption_projection_dim=1536, num_layers=6, dual_attention_layers=(0, 1, 2)
    )
    return {
        **{name: network(UNet2DConditionModel, config) for name, config in unets.items()},
        "sd3": network(SD3Transformer2DModel, sd3),
        "flux": network(FluxTransformer2DModel, FluxTransformerConfig(num_layers=2, num_single_layers=1)),
        "z_image": network(ZImageTransformer2DModel, ZImageTransformerConfig(n_layers=2)),
    }


def held_share(network, sizes, rules=TENSOR_RULES):
    """Return the share of a network's trained elements that a device holds."""
    placement = Placement(AbstractMesh(sizes, AXES), rules)
    trained = {name: spec for name, spec in network.specs.items() if spec.is_trainable}
    held = sum(math.prod(placement(name, spec).shard_shape(spec.shape)) for name, spec in trained.items())
    return held / sum(math.prod(spec.shape) for spec in trained.values())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "z_image"])
def test_rules_split_most_of_the_published_denoisers(networks, name):
    assert held_share(networks[name], (1, 16, 1)) < 1 / 15.5
    assert held_share(networks[name], (1, 1, 4)) < 0.4  # what no rule names is copied


def test_every_rule_finds_something_to_split(networks):
    for rule in TENSOR_RULES:
        assert any(held_share(network, (1, 1, 4), (rule,)) < 1 for network in networks.values()), rule


def test_statistics_lie_where_their_parameter_lies():
    specs = {"big.kernel": ParamSpec((512, 256), LINEAR), "bias": ParamSpec((8,), (0,))}
    placement = Placement(AbstractMesh((1, 4, 1), AXES))
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    adam = jax.eval_shape(optax.adam(1e-3).init, params)
    state = placement.state(specs, adam)
    assert state[0].mu["big.kernel"].spec == PartitionSpec(None, "fsdp")
    assert state[0].mu["bias"].spec == PartitionSpec()
    assert state[0].count.spec == PartitionSpec()
    conv = {"conv.kernel": ParamSpec((3, 3, 512, 256), CONV)}
    factors = {"row": {"conv.kernel": jax.ShapeDtypeStruct((3, 1, 512, 256), jnp.float32)}}
    assert placement.state(conv, factors)["row"]["conv.kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    vector = {"row": {"big.kernel": jax.ShapeDtypeStruct((512, 1), jnp.float32)}}
    assert placement.state(specs, vector)["row"]["big.kernel"].spec == PartitionSpec()


def test_the_scales_of_a_quantised_parameter_lie_where_its_numbers_lie():
    to_out = "mid_block.attn1.to_out.0.kernel"

    def axes(kind, shape, sizes):
        placement, held = Placement(AbstractMesh(sizes, AXES)), quantised_shape(shape, QTYPES[kind])
        return [place.spec for place in jax.tree.leaves(placement.of_parts(to_out, ParamSpec(shape, LINEAR), held))]

    assert axes("nf4", (640, 320), (1, 4, 1)) == [PartitionSpec(None, "fsdp")] * 2
    assert axes("int8", (640, 320), (1, 4, 1)) == [PartitionSpec(None, "fsdp")] * 2
    assert axes("int8", (640, 320), (1, 1, 4)) == [PartitionSpec("tensor"), PartitionSpec()]
    assert axes("nf4", (1024, 320), (1, 1, 4)) == [PartitionSpec("tensor")] * 2
    assert axes("nf4", (640, 320), (1, 1, 4)) == [PartitionSpec("tensor"), PartitionSpec()]  # of 10 blocks


def test_copies_of_the_model_share_the_optimizer_state():
    specs = {"big.kernel": ParamSpec((512, 256), LINEAR), "small.kernel": ParamSpec((SMALL // 128, 64), LINEAR)}
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    adam = jax.eval_shape(optax.adam(1e-3).init, params)

    def moment(name, sizes):
        placement = Placement(AbstractMesh(sizes, AXES))
        return placement.state(specs, adam, over_data=True)[0].mu[name].spec

    assert moment("big.kernel", (8, 1, 1)) == PartitionSpec(None, "data")
    assert moment("big.kernel", (4, 2, 1)) == PartitionSpec("data", "fsdp")
    assert moment("small.kernel", (8, 1, 1)) == PartitionSpec()


def test_the_table_says_where_each_parameter_lies():
    specs = {"big.kernel": ParamSpec((512, 256), LINEAR), "bias": ParamSpec((8,), (0,))}
    summary, *rows = Placement(AbstractMesh((1, 4, 1), AXES)).table(specs, "float32").splitlines()
    assert summary.startswith("0.1 MiB per device of 0.5 MiB in total")
    assert rows[0].split() == ["big.kernel", "512", "x", "256", "-,", "fsdp", "131,072"]
    assert rows[1].split() == ["bias", "8", "copied", "32"]


def test_a_mesh_takes_what_is_left():
    count = jax.device_count()
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": count, "tensor": 1}
    assert dict(make_mesh(data=1, tensor=-1).shape) == {"data": 1, "fsdp": 1, "tensor": count}
    with pytest.raises(
        ValueError, match=r"mesh.data=3 x mesh.fsdp=5 x mesh.tensor=1 does not make \d+ devices\. Set one"
    ):
        make_mesh(data=3, fsdp=5)


ROOT = Path(__file__).parents[1]
GATHER = """
import re
import dpo_jax, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
from dpo_jax.sharding import Placement, batch_sharding, make_mesh
from dpo_jax.weights.layout import ParamSpec
spec = ParamSpec((512, 512), (1, 0))
placement = Placement(make_mesh(1, 8, 1))
weights = jax.ShapeDtypeStruct(spec.shape, jnp.float64, sharding=placement("kernel", spec))
x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=batch_sharding(placement.mesh))
multiply = jax.jit(lambda w, x: x @ placement.gathered("kernel", spec, w.astype(jnp.float32)))
print(re.findall(r"= (\\w+)\\[\\S+ all-gather\\(", multiply.lower(weights, x).compile().as_text()))
"""


def test_devices_exchange_rounded_weights():
    """CPUs have no collectives in bfloat16, so masters are float64 here and layers float32."""
    done = subprocess.run([sys.executable, "-c", GATHER], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['f32']"
