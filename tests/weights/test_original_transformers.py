"""Original files of flow models, with diffusers' converters as the oracles."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils
from etils import epath
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dpo_jax.weights import original
from dpo_jax.weights.file_kinds import kind_of
from dpo_jax.weights.io import load_params, read_params, save_component
from dpo_jax.weights.layout import Specs, torch_name
from dpo_jax.weights.mapped_file import fetch
from tests.weights.torch_transformers import CONVERTERS, full_size_shapes, params_of, specs_of, tiny

PREFIX = "model.diffusion_model."


def numbered(specs: Specs) -> dict[str, np.ndarray]:
    """Parameters in which every element is another number."""
    start, params = 0, {}
    for name, spec in specs.items():
        size = int(np.prod(spec.shape))
        params[name] = np.arange(start, start + size, dtype=np.float32).reshape(spec.shape)
        start += size
    assert start < 2**24
    return params


def narrowed(shapes: dict[str, torch.Size]) -> Specs:
    """The specs of a network of the same names and rows, with one input per layer."""
    return specs_of({name: torch.Size([shape[0], *[1 for _ in shape[1:]]]) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("name", "model_type", "convert", "count"),
    [
        ("sd3_medium", "sd3", CONVERTERS["sd3"], 682 + 1),
        ("sd35_medium", "sd35_medium", CONVERTERS["sd3"], 908 + 1),
        ("sd35_large", "sd35_large", CONVERTERS["sd3"], 1226 + 1),
        ("flux_dev", "flux-dev", CONVERTERS["flux"], 1160),
        ("flux_schnell", "flux-schnell", CONVERTERS["flux"], 1156),
        ("z_image", "z-image-turbo", CONVERTERS["z_image"], 521),
    ],
)
def test_diffusers_reads_what_is_written(
    name: str, model_type: str, convert: Callable, count: int, tmp_path: Path
) -> None:
    specs = narrowed(full_size_shapes(name))
    params = numbered(specs)
    original.write(epath.Path(tmp_path / "model.safetensors"), {PREFIX: (params, specs)}, dtype=None)
    stored = load_file(tmp_path / "model.safetensors")
    described = stored | {f"{PREFIX}pos_embed": torch.zeros(1, 384**2 if name == "sd35_medium" else 36864, 1)}
    assert single_file_utils.infer_diffusers_model_type(described) == model_type
    converted = convert(dict(stored))
    assert len(converted) == len(specs) == count
    for ours, spec in specs.items():
        theirs = converted[torch_name(ours)].numpy()
        np.testing.assert_array_equal(theirs, params[ours].transpose(spec.torch_axes), err_msg=ours)
    read = read_params(tmp_path / "model.safetensors", specs, prefix=PREFIX)
    for ours in specs:
        np.testing.assert_array_equal(fetch(read[ours]), params[ours], err_msg=ours)


@pytest.fixture(params=["sd3", "flux", "z_image"])
def tiny_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Specs, dict[str, np.ndarray]]:
    state = tiny(request.param).state_dict()
    specs, params = specs_of({name: tensor.shape for name, tensor in state.items()}), params_of(state)
    original.write(epath.Path(tmp_path / "tiny.safetensors"), {PREFIX: (params, specs)}, dtype=None)
    return tmp_path / "tiny.safetensors", specs, params


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[name]), value, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", PREFIX])
def test_files_of_a_transformer_alone(
    prefix: str, tiny_file: tuple[Path, Specs, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, specs, params = tiny_file
    stored = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    # Z-Image's first release holds a norm that nothing uses.
    save_file(stored | {f"{prefix}norm_final.weight": torch.ones(1)}, tmp_path / "alone.safetensors")
    assert_same(load_params(tmp_path / "alone.safetensors", specs, dtype="float32", prefix=PREFIX), params)
    read = read_params(tmp_path / "alone.safetensors", specs, prefix=PREFIX)
    original.write(epath.Path(tmp_path / "again.safetensors"), {prefix: (read, specs)}, dtype=None)
    save_file(stored, tmp_path / "by_pytorch.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "by_pytorch.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "shard_kb"), [("sd3", 1000), ("sd3", 40), ("flux", 40), ("z_image", 600)])
def test_a_folder_that_pytorch_wrote_stays_the_same(name: str, shard_kb: int, tmp_path: Path) -> None:
    model = tiny(name).half()
    model.save_pretrained(tmp_path / "first", max_shard_size=f"{shard_kb}KB")
    specs = specs_of({key: tensor.shape for key, tensor in model.state_dict().items()})
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    read = read_params(tmp_path / "first", specs)
    save_component(tmp_path / "again", config, read, specs, dtype=None, max_shard_bytes=shard_kb * 1000)
    first, again = (
        {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in ("first", "again")
    )
    assert again == first
    assert (len(first) == 2) == (shard_kb == 1000)


def test_only_swapped_halves_are_copied(tiny_file: tuple[Path, Specs, dict[str, np.ndarray]]) -> None:
    path, specs, _ = tiny_file
    copied = {name for name, array in read_params(path, specs, prefix=PREFIX).items() if type(array) is np.ndarray}
    swapped = {"transformer_blocks.2.norm1_context.linear", "norm_out.linear"}
    assert {name.rpartition(".")[0] for name in copied} == {name for name in swapped if f"{name}.bias" in specs}


def test_current_names_in_one_file(tiny_file: tuple[Path, Specs, dict[str, np.ndarray]], tmp_path: Path) -> None:
    _, specs, params = tiny_file
    current = {
        torch_name(name): torch.tensor(params[name].transpose(spec.torch_axes)).contiguous()
        for name, spec in specs.items()
    }
    for prefix in ("", PREFIX):
        save_file({prefix + name: tensor for name, tensor in current.items()}, tmp_path / "current.safetensors")
        assert_same(load_params(tmp_path / "current.safetensors", specs, dtype="float32", prefix=PREFIX), params)


def test_fused_tensors_of_another_width(tiny_file: tuple[Path, Specs, dict[str, np.ndarray]]) -> None:
    path, specs, _ = tiny_file
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("qkv.weight"))
    save_file(stored | {name: stored[name][: len(stored[name]) // 3].contiguous()}, path)
    with pytest.raises(
        ValueError, match=r"3 misshapen: .*_q(_proj)?.weight \(stored as .*, the model needs (48|72) rows\)"
    ):
        load_params(path, specs, dtype="float32", prefix=PREFIX)


@pytest.mark.parametrize(
    ("held", "wanted", "message"),
    [
        ("sd3", "flux", r"holds the transformer of SD3; a file or folder of the transformer of FLUX\.1 is needed"),
        ("flux", "z_image", r"holds the transformer of FLUX\.1; .* of the transformer of Z-Image is needed here"),
        (
            "z_image",
            "sd3",
            "holds the transformer of Z-Image; .* of the transformer of SD3 is needed here",
        ),
    ],
)
def test_a_file_of_another_family_is_named(held: str, wanted: str, message: str, tmp_path: Path) -> None:
    specs = {name: specs_of({key: x.shape for key, x in tiny(name).state_dict().items()}) for name in (held, wanted)}
    path = tmp_path / "model.safetensors"
    original.write(epath.Path(path), {PREFIX: (numbered(specs[held]), specs[held])}, dtype=None)
    with pytest.raises(ValueError, match=message):
        load_params(path, specs[wanted], dtype="float32", prefix=PREFIX)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "the transformer of FLUX.1"),
        ("transformer_blocks.0.norm1_context.linear.bias", "the transformer of SD3"),
        ("model.diffusion_model.single_stream_modulation.lin.weight", "the transformer of FLUX.2"),
        ("model.layers.0.mlp.gate_proj.weight", "a language model such as Qwen3"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.layer_norm.weight", "a T5 text encoder"),
        ("vae.decoder.conv_in.weight", "a VAE"),
        ("x", None),
    ],
)
def test_kinds_of_files(name: str, kind: str | None) -> None:
    assert kind_of([name, "beside"]) == kind


def test_whole_files_of_flow_models(tmp_path: Path) -> None:
    """ComfyUI's names of the VAE and of T5; SD3's CLIP-L without a projection."""
    t5 = {"shared.weight": torch.Size([5, 4]), "encoder.final_layer_norm.weight": torch.Size([4])}
    clip = {"text_model.final_layer_norm.weight": torch.Size([4]), "text_projection.weight": torch.Size([4, 4])}
    t5, clip = specs_of(t5), specs_of(clip)
    prefixes = "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer."
    params = numbered(t5), numbered(clip) | {"text_projection.kernel": np.eye(4, dtype=np.float32)}
    parts = {prefix: (own, specs) for prefix, own, specs in zip(prefixes, params, (t5, clip), strict=True)}
    path = tmp_path / "whole.safetensors"
    original.write(epath.Path(path), parts, dtype=None)
    stored = load_file(path)
    assert stored.keys() == {
        f"{prefixes[0]}shared.weight",
        f"{prefixes[0]}encoder.embed_tokens.weight",
        f"{prefixes[0]}encoder.final_layer_norm.weight",
        f"{prefixes[1]}text_model.final_layer_norm.weight",
    }
    extra = {f"{prefixes[0]}spiece_model": torch.ones(3), f"{prefixes[1]}logit_scale": torch.zeros(())}
    save_file(stored | extra | {"vae.encoder.x": torch.ones(3)}, path)
    for prefix, (own, specs) in parts.items():
        assert_same(load_params(path, specs, dtype="float32", prefix=prefix), own)
    vae = specs_of({"encoder.x": torch.Size([3])})
    for prefix in ("first_stage_model.", "vae."):
        assert load_params(path, vae, dtype="float32", prefix=prefix)["encoder.x"].sum() == 3
    with pytest.raises(ValueError, match=r"none of its tensors begins with model\.diffusion_model"):
        load_params(path, vae, dtype="float32", prefix=PREFIX)
    with pytest.raises(ValueError, match=r"text_projection that is not the identity.*--format=diffusers"):
        original.write(epath.Path(path), {prefixes[1]: (numbered(clip), clip)}, dtype=None)


def test_diffusers_opens_a_whole_file_of_sd3(tmp_path: Path) -> None:
    """Transformer, VAE and the three text encoders, which have transformers' names."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 9,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 6,
    }
    clips = [
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=width, projection_dim=width, **sizes)).eval()
        for width in (4, 8)
    ]
    clips[0].text_projection.weight.data = torch.eye(4)
    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=6, d_kv=3, d_ff=8, num_layers=2, num_heads=2)).eval()
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    networks = {
        "transformer": (PREFIX, tiny("sd3")),
        "vae": ("first_stage_model.", vae),
        "text_encoder": ("text_encoders.clip_l.transformer.", clips[0]),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", clips[1]),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", t5),
    }
    others = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = StableDiffusion3Pipeline(
        **{name: network for name, (_, network) in networks.items()}, scheduler=scheduler, **others
    )
    pipeline.save_pretrained(tmp_path / "folder")
    parts = {}
    for prefix, network in networks.values():
        state = {name: x for name, x in network.state_dict().items() if name != "encoder.embed_tokens.weight"}
        parts[prefix] = params_of(state), specs_of({name: x.shape for name, x in state.items()})
    original.write(epath.Path(tmp_path / "sd3.safetensors"), parts, dtype=None)
    read = StableDiffusion3Pipeline.from_single_file(
        tmp_path / "sd3.safetensors", config=str(tmp_path / "folder"), local_files_only=True, **others
    )
    for name, (prefix, network) in networks.items():
        state, theirs = network.state_dict(), getattr(read, name).state_dict()
        assert state.keys() == theirs.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=0, msg=f"{name}: {key}")
        own, specs = parts[prefix]
        assert_same(load_params(tmp_path / "sd3.safetensors", specs, dtype="float32", prefix=prefix), own)
