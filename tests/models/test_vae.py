"""AutoencoderKL matches diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoderKL

from dpo_jax.models.network import Network
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.weights.layout import from_torch, torch_name


def config_json(*widths, **fields):
    levels = len(widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        **fields,
    }


TWO_LEVELS = config_json(8, 16)
SD3 = config_json(4, 8, 12, 12) | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
NO_OPTIONS = config_json(
    8,
    16,
    layers_per_block=2,
    latent_channels=6,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)
FULL_SIZE = config_json(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32, act_fn="silu", latents_mean=None)


def build(fields, dtype):
    config = VAEConfig.from_dict(fields, "vae/config.json")
    return Network.build(lambda rngs: AutoencoderKL(config, dtype=dtype, rngs=rngs), config)


def torch_model(fields, dtype=torch.float32):
    """Draw random weights, even where diffusers would start with ones and zeros."""
    torch.manual_seed(0)
    model = TorchAutoencoderKL(**{k: v for k, v in fields.items() if not k.startswith("_")}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def copy_params(network, model):
    state = model.state_dict()
    assert len(state) == len(network.specs)
    return {
        name: jnp.asarray(from_torch(state[torch_name(name)].numpy(), spec)) for name, spec in network.specs.items()
    }


def run(network, params, x_NHWC, method):
    return jax.jit(lambda params, x_NHWC: network(params, x_NHWC, method=method))(params, x_NHWC)


def relative_error(ours_NHWC, theirs_NCHW):
    theirs_NHWC = theirs_NCHW.detach().permute(0, 2, 3, 1).numpy()
    assert ours_NHWC.shape == theirs_NHWC.shape
    assert ours_NHWC.dtype == theirs_NHWC.dtype
    return np.abs(ours_NHWC - theirs_NHWC).max() / np.abs(theirs_NHWC).max()


def to_torch_image(x_NHWC):
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2)


@pytest.mark.parametrize("fields", [TWO_LEVELS, SD3, NO_OPTIONS], ids=["two", "sd3", "no_options"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
def test_encode_and_decode_agree_with_diffusers(fields, dtype, tolerance, x64):
    network, model = build(fields, dtype), torch_model(fields, getattr(torch, dtype))
    params = copy_params(network, model)
    images_NHWC = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(dtype)

    mean_NhwC, logvar_NhwC = run(network, params, images_NHWC, "encode")
    posterior = model.encode(to_torch_image(images_NHWC)).latent_dist
    assert relative_error(mean_NhwC, posterior.mean) < tolerance
    assert relative_error(logvar_NhwC, posterior.logvar) < tolerance

    latents_NhwC = np.random.default_rng(1).normal(size=mean_NhwC.shape).astype(dtype)
    theirs = model.decode(to_torch_image(latents_NhwC)).sample
    assert relative_error(run(network, params, latents_NhwC, "decode"), theirs) < tolerance


def test_log_variance_is_clamped_as_in_diffusers():
    network, model = build(TWO_LEVELS, "float32"), torch_model(TWO_LEVELS)
    with torch.no_grad():
        model.quant_conv.bias[4:] += torch.tensor([100.0, -100.0, 0.0, 0.0])
    images_NHWC = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("float32")
    _, logvar_NhwC = run(network, copy_params(network, model), images_NHWC, "encode")
    assert relative_error(logvar_NhwC, model.encode(to_torch_image(images_NHWC)).latent_dist.logvar) < 1e-5
    assert logvar_NhwC.max() == 20
    assert logvar_NhwC.min() == -30


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        (FULL_SIZE, 83_653_863),
        (FULL_SIZE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}, 83_653_863),
        (SD3 | FULL_SIZE, 83_819_683),
    ],
    ids=["sd", "sdxl", "sd3"],
)
def test_full_size_names_and_shapes_agree_with_diffusers(fields, count):
    specs = build(fields, "float32").specs
    with torch.device("meta"):
        state = TorchAutoencoderKL(**{k: v for k, v in fields.items() if not k.startswith("_")}).state_dict()
    assert {torch_name(name): spec.torch_shape for name, spec in specs.items()} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    assert sum(np.prod(spec.shape) for spec in specs.values()) == count


def test_config_reads_what_diffusers_writes():
    config = VAEConfig.from_dict(dict(torch_model(NO_OPTIONS).config), "vae/config.json")
    assert config.block_out_channels == (8, 16)
    assert config.layers_per_block == 2
    assert (config.use_quant_conv, config.use_post_quant_conv, config.mid_block_add_attention) == (False, False, False)
    assert (config.scaling_factor, config.shift_factor) == (0.18215, None)
    config = VAEConfig.from_dict(SD3, "vae/config.json")
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (16, 1.5305, 0.0609)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderKLTemporalDecoder"),
        ("act_fn", "relu"),
        ("latents_mean", [0.0] * 4),
        ("latents_std", [1.0] * 4),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("patch_size", 2),
    ],
)
def test_unsupported_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^vae/config\.json: .*\b{field} = "):
        VAEConfig.from_dict(TWO_LEVELS | {field: value}, "vae/config.json")


def test_bfloat16_stays_close_to_float32():
    params = copy_params(build(TWO_LEVELS, "float32"), torch_model(TWO_LEVELS))
    latents_NhwC = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype("float32")
    half_NHWC, full_NHWC = (
        run(build(TWO_LEVELS, dtype), params, latents_NhwC, "decode") for dtype in ("bfloat16", "float32")
    )
    assert half_NHWC.dtype == jnp.bfloat16
    assert 0 < np.abs(half_NHWC.astype("float32") - full_NHWC).max() < 0.05 * np.abs(full_NHWC).max()


def test_gradient_reaches_every_parameter(x64):
    network = build(TWO_LEVELS, "float64")
    params = copy_params(network, torch_model(TWO_LEVELS, torch.float64))
    images_NHWC = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3))

    def loss(params):
        mean_NhwC, logvar_NhwC = network(params, images_NHWC, method="encode")
        latents_NhwC = mean_NhwC + jnp.exp(0.5 * logvar_NhwC)
        return jnp.square(network(params, latents_NhwC, method="decode") - images_NHWC).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    largest = {name: np.abs(gradient).max() for name, gradient in gradients.items()}
    # Softmax ignores a shift that all keys share.
    key_bias = {"encoder.mid_block.attentions.0.to_k.bias", "decoder.mid_block.attentions.0.to_k.bias"}
    assert {name for name, value in largest.items() if value < 1e-9} == key_bias
