"""The original single-file layout, with diffusers' converters and `from_single_file` as the oracles."""

import dataclasses
import json
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from etils import epath
from safetensors.torch import load_file, save_file

from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.denoiser import DENOISER_PREFIX
from dpo_jax.models.families import FAMILIES, PUBLISHED, UNET
from dpo_jax.models.network import Network
from dpo_jax.models.random_model import RANDOM_MODELS, VAE, random_params, write_random_model
from dpo_jax.models.single_file import VAE_PREFIXES, absent_from_file, family_of_single_file
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.weights import original, original_names, safetensors_file
from dpo_jax.weights.io import load_params, read_params
from dpo_jax.weights.layout import Params, Specs, torch_name
from dpo_jax.weights.original_names import Original
from dpo_jax.weights.original_slots import layer_slots

PUBLISHED_VAE = VAE | {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
CLIP_H = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    with_projection=True,
)
PUBLISHED_CLIPS = {
    "sd15": (CLIP_L,),
    "sd21": (CLIP_H,),
    "sdxl": (CLIP_L, CLIP_G),
    "sdxl_turbo": (CLIP_L, CLIP_G),
    "sdxl_refiner": (CLIP_G,),
}
NARROW = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 6, "vocab_size": 5, "projection_dim": 7}

Components = dict[str, tuple[Params, Specs]]


@cache
def published_unet_specs(family: str) -> Specs:
    return unet_specs(published_unet(family))


@cache
def published_vae_specs() -> Specs:
    return vae_specs(PUBLISHED_VAE)


def unet_specs(config: dict[str, Any]) -> Specs:
    parsed = UNetConfig.from_dict(config, "unet")
    return Network.build(lambda rngs: UNet2DConditionModel(parsed, dtype="float32", rngs=rngs), parsed).specs


def vae_specs(config: dict[str, Any]) -> Specs:
    parsed = VAEConfig.from_dict(config, "vae")
    return Network.build(lambda rngs: AutoencoderKL(parsed, dtype="float32", rngs=rngs), parsed).specs


@cache
def clip_specs(config: CLIPTextConfig) -> Specs:
    return Network.build(lambda rngs: CLIPTextModel(config, dtype="float32", rngs=rngs), config).specs


def published_unet(family: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / family / "unet" / "config.json").read_text())


def tagged(names: dict[str, Original], prefix: str) -> dict[str, torch.Tensor]:
    """A checkpoint in which every tensor is another number."""
    return {prefix + of.tensor: torch.full((1, 1, 1, 1), index) for index, of in enumerate(names.values())}


def values(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(tensor.reshape(())) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("family", "count"), [("sd15", 686), ("sd21", 686), ("sdxl", 1680), ("sdxl_turbo", 1680), ("sdxl_refiner", 1220)]
)
def test_unet_names_at_full_size_are_those_that_diffusers_reads(family: str, count: int) -> None:
    specs = published_unet_specs(family)
    names = original_names.unet_names(specs)
    checkpoint = tagged(names, "model.diffusion_model.")
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, published_unet(family))
    assert len(names) == count
    assert values(converted) == {torch_name(name): index for index, name in enumerate(specs)}
    assert layer_slots(specs)["mid_block.resnets.1.conv2"].tensor == "middle_block.2.out_layers.3"


def test_vae_names_at_full_size_are_those_that_diffusers_reads() -> None:
    specs = published_vae_specs()
    names = original_names.vae_names(specs)
    converted = single_file_utils.convert_ldm_vae_checkpoint(tagged(names, "first_stage_model."), PUBLISHED_VAE)
    assert len(names) == 248
    assert values(converted) == {torch_name(name): index for index, name in enumerate(specs)}


@pytest.mark.parametrize("config", [CLIP_H, CLIP_G], ids=["H", "bigG"])
def test_openclip_at_full_depth_is_what_diffusers_reads(config: CLIPTextConfig, tmp_path: Path) -> None:
    specs = clip_specs(dataclasses.replace(config, **NARROW))
    params = random_params(specs, 0)
    original.write(epath.Path(tmp_path / "clip.safetensors"), {"cond_stage_model.model.": (params, specs)}, dtype=None)
    stored = load_file(tmp_path / "clip.safetensors")
    if config.with_projection:  # under SD2's prefix diffusers ignores it
        stored = {name.replace("cond_stage_model.", "conditioner.embedders.1."): x for name, x in stored.items()}
    converted = single_file_utils.convert_open_clip_checkpoint(
        SimpleNamespace(config=SimpleNamespace(hidden_size=4)),
        stored,
        prefix="conditioner.embedders.1.model." if config.with_projection else "cond_stage_model.model.",
    )
    assert converted.keys() == {torch_name(name) for name in specs}
    for name, spec in specs.items():
        np.testing.assert_array_equal(converted[torch_name(name)], params[name].transpose(spec.torch_axes))


@pytest.mark.parametrize(
    ("family", "model_type", "counts"),
    [
        ("sd15", "v1", {"model": 686, "first_stage_model": 248, "cond_stage_model": 196}),
        ("sd21", "v2", {"model": 686, "first_stage_model": 248, "cond_stage_model": 23 * 12 + 4}),
        ("sdxl", "xl_base", {"model": 1680, "first_stage_model": 248, "conditioner": 196 + 389}),
        ("sdxl_turbo", "xl_base", {"model": 1680, "first_stage_model": 248, "conditioner": 196 + 389}),
        ("sdxl_refiner", "xl_refiner", {"model": 1220, "first_stage_model": 248, "conditioner": 389}),
    ],
)
def test_files_at_full_size_are_known_by_what_they_hold(
    family: str, model_type: str, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = FAMILIES[family].text_encoders
    all_specs = {
        DENOISER_PREFIX: published_unet_specs(family),
        VAE_PREFIXES[0]: published_vae_specs(),
        **{e.original_prefix: clip_specs(c) for e, c in zip(encoders, PUBLISHED_CLIPS[family], strict=True)},
    }
    written: dict[str, torch.Tensor] = {}

    def keep_header(
        path: epath.Path, tensors: object, header: dict[str, tuple], *more: object, **options: object
    ) -> None:
        written.update({name: torch.empty(shape, device="meta") for name, (shape, _) in header.items()})

    monkeypatch.setattr(safetensors_file, "write", keep_header)
    original.write(epath.Path("unused"), {prefix: ({}, specs) for prefix, specs in all_specs.items()}, dtype="float16")
    assert single_file_utils.infer_diffusers_model_type(written) == model_type
    assert Counter(name.split(".")[0] for name in written) == counts
    assert sum(tensor.numel() for tensor in written.values()) == sum(
        np.prod(spec.shape) for specs in all_specs.values() for spec in specs.values()
    )
    assert written["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)
    # Only Turbo can't be told from its twin.
    assert family_of_single_file(written.keys(), "here").name == family.removesuffix("_turbo")
    assert family_of_single_file(written.keys(), "here", family).name == family


@pytest.fixture(scope="module", params=[name for name, family in FAMILIES.items() if family.denoiser is UNET])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each family."""
    folder = tmp_path_factory.mktemp("models") / family
    write_random_model(family, folder)
    return folder


@pytest.fixture(scope="module")
def components(family: str, folder: Path) -> Components:
    """Parameters and specs of each component by its prefix."""
    _, unet, clips, _ = RANDOM_MODELS[family]
    encoders = FAMILIES[family].text_encoders
    parts = {"unet": (DENOISER_PREFIX, unet_specs(unet)), "vae": (VAE_PREFIXES[0], vae_specs(VAE))}
    for encoder in encoders:
        config_json = json.loads((folder / encoder.folder / "config.json").read_text())
        specs = clip_specs(CLIPTextConfig.from_dict(config_json, encoder.folder))
        parts[encoder.folder] = (encoder.original_prefix, specs)
    assert len(clips) == len(encoders)
    return {
        prefix: (load_params(folder / name, specs, dtype="float32"), specs) for name, (prefix, specs) in parts.items()
    }


@pytest.fixture(scope="module")
def single_file(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    original.write(epath.Path(path), components, dtype="float32")
    return path


def assert_same(params: Params, others: Params) -> None:
    assert params.keys() == others.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


def test_single_file_holds_what_the_folder_does(components: Components, single_file: Path, tmp_path: Path) -> None:
    read = {
        prefix: (load_params(single_file, specs, dtype="float32", prefix=prefix), specs)
        for prefix, (_, specs) in components.items()
    }
    for prefix, (params, _) in components.items():
        assert_same(read[prefix][0], params)
    original.write(epath.Path(tmp_path / "again.safetensors"), read, dtype="float32")
    assert (tmp_path / "again.safetensors").read_bytes() == single_file.read_bytes()


def test_diffusers_opens_the_single_file(folder: Path, single_file: Path) -> None:
    expected = diffusers.DiffusionPipeline.from_pretrained(folder)
    read = type(expected).from_single_file(single_file, config=str(folder), local_files_only=True)
    for name, component in expected.components.items():
        if isinstance(component, torch.nn.Module):
            state, other = component.state_dict(), getattr(read, name).state_dict()
            assert state.keys() == other.keys()
            for key, tensor in state.items():
                torch.testing.assert_close(other[key], tensor, rtol=0, atol=0, msg=f"{name}: {key}")


def test_reading_copies_nothing(components: Components, single_file: Path) -> None:
    for prefix, (_, specs) in components.items():
        arrays = read_params(single_file, specs, prefix=prefix)
        assert arrays.keys() == specs.keys()
        assert {(type(array), array.flags.owndata) for array in arrays.values()} == {(np.memmap, False)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
def test_written_in_the_dtype_asked_for(dtype: str | None, tmp_path: Path) -> None:
    specs = vae_specs(VAE)
    params = {name: jax.numpy.asarray(value) for name, value in random_params(specs, 0).items()}
    params["quant_conv.bias"] = params["quant_conv.bias"].astype("float16")
    original.write(epath.Path(tmp_path / "vae.safetensors"), {"": (params, specs)}, dtype=dtype)
    stored = load_file(tmp_path / "vae.safetensors")
    assert stored["quant_conv.bias"].dtype == getattr(torch, dtype or "float16")
    assert stored["encoder.conv_in.weight"].dtype == getattr(torch, dtype or "float32")
    kernel = torch.tensor(np.asarray(params["encoder.conv_in.kernel"])).permute(3, 2, 0, 1)
    assert torch.equal(stored["encoder.conv_in.weight"], kernel.to(stored["encoder.conv_in.weight"].dtype))


def test_a_component_alone_is_read_under_either_names(tmp_path: Path) -> None:
    _, sdxl_unet, _, _ = RANDOM_MODELS["sdxl"]
    for specs, prefix in ((vae_specs(VAE), "first_stage_model."), (unet_specs(sdxl_unet), "model.diffusion_model.")):
        params = random_params(specs, 0)
        as_original, as_today, prefixed = (
            tmp_path / f"{kind}.safetensors" for kind in ("original", "today", "prefixed")
        )
        original.write(epath.Path(as_original), {"": (params, specs)}, dtype=None)
        torch_params = {
            torch_name(name): torch.tensor(params[name].transpose(spec.torch_axes)).contiguous()
            for name, spec in specs.items()
        }
        save_file(torch_params, as_today)
        save_file({prefix + name: tensor for name, tensor in torch_params.items()}, prefixed)
        assert load_file(as_original).keys() != load_file(as_today).keys()
        for path in (as_original, as_today, prefixed):
            assert_same(load_params(path, specs, dtype="float32", prefix=prefix), params)


def test_what_is_no_part_of_the_network_is_left_out(tmp_path: Path) -> None:
    whole = clip_specs(CLIPTextConfig(num_hidden_layers=3, **NARROW))
    specs = {name: spec for name, spec in whole.items() if "layers.2." not in name}  # as SD2's folder drops it
    params = random_params(whole, 0)
    path, prefix = tmp_path / "sd21.safetensors", "cond_stage_model.model."
    original.write(epath.Path(path), {prefix: (params, whole)}, dtype=None)
    extras = {"logit_scale": (), "text_projection": (4, 4), "attn_mask": (77, 77)}
    beside = {"model_ema.decay": (), "cond_stage_model.logit_scale": (), "alphas_cumprod": (1000,)}
    stored = load_file(path) | {prefix + name: torch.zeros(shape) for name, shape in extras.items()}
    save_file(stored | {name: torch.zeros(shape) for name, shape in beside.items()}, path)
    assert any("resblocks.2." in name for name in stored)
    expected = {name: params[name] for name in specs}
    assert_same(load_params(path, specs, dtype="float32", prefix=prefix), expected)

    save_file(stored | {f"{prefix}transformer.resblocks.3.ln_1.bias": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected: transformer\.resblocks\.3\.ln_1\.bias$"):
        load_params(path, specs, dtype="float32", prefix=prefix)


def test_training_left_tensors_in_a_vae(tmp_path: Path) -> None:
    specs = vae_specs(VAE)
    params, path = random_params(specs, 0), tmp_path / "vae.safetensors"
    original.write(epath.Path(path), {"": (params, specs)}, dtype=None)
    save_file(load_file(path) | {"loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.zeros(())}, path)
    assert_same(load_params(path, specs, dtype="float32", prefix="first_stage_model."), params)


def test_all_that_does_not_fit_is_reported_at_once(tmp_path: Path) -> None:
    specs = clip_specs(CLIPTextConfig(num_hidden_layers=1, **NARROW))
    path, prefix = tmp_path / "sd21.safetensors", "cond_stage_model.model."
    original.write(epath.Path(path), {prefix: (random_params(specs, 0), specs)}, dtype=None)
    stored = load_file(path)
    stored[f"{prefix}ln_last.bias"] = stored.pop(f"{prefix}ln_final.bias")
    stored[f"{prefix}transformer.resblocks.0.attn.in_proj_bias"] = torch.zeros(13)
    save_file(stored, path)
    with pytest.raises(ValueError, match="does not hold the model") as error:
        load_params(path, specs, dtype="float32", prefix=prefix)
    message = str(error.value)
    assert "1 missing: text_model.final_layer_norm.bias; 1 unexpected: ln_last.bias; 3 misshapen: " in message
    assert "q_proj.bias (stored as (13,), the model needs 12 rows)" in message


FLUX_DEV = "black-forest-labs/FLUX.1-dev"
UNET_TENSOR = "model.diffusion_model.input_blocks.0.0.weight"
CLIP_OF = {family.name: f"{family.text_encoders[-1].original_prefix}x" for family in FAMILIES.values()}


@pytest.mark.parametrize(
    ("names", "name", "message"),
    [
        (["lora_unet_down_blocks_1_attentions_0_proj_in.hada_w1_a"], None, "holds a LoRA"),
        (["unet.down_blocks.1.attentions.0.to_q.lora_A.weight"], None, "holds a LoRA"),
        (["model.diffusion_model.joint_blocks.0.x"], "sdxl", "holds a model of the family sd3, not sdxl; leave"),
        (["double_blocks.0.img_attn.x", "guidance_in.x"], "flux_schnell", "holds a model of the family flux, not"),
        (["double_blocks.0.img_attn.x"], "flux", "holds a model of the family flux_schnell, not flux; leave"),
        (
            ["single_stream_modulation.lin.weight", "double_blocks.0.x"],
            None,
            "holds the transformer of FLUX.2; a model",
        ),
        (["distilled_guidance_layer.in_proj.weight", "double_blocks.0.x"], None, "holds the transformer of Chroma; a"),
        (["transformer_blocks.0.attn.to_q.weight", "txt_norm.weight"], None, "holds the transformer of Qwen-Image; a"),
        (["control_model.input_blocks.0.0.weight"], None, "holds a ControlNet"),
        ([UNET_TENSOR], None, "holds a UNet without text encoders"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], None, "holds a UNet without text encoders"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], None, "holds a VAE;"),
        (["text_model.final_layer_norm.bias"], None, "holds a CLIP text encoder;"),
        (["b", "d", "c", "a"], None, "holds tensors such as a, b, c;"),
        (
            [UNET_TENSOR, CLIP_OF["sdxl_refiner"], "edm_mean"],
            None,
            "holds a tensor edm_mean, so it has the noise",
        ),
        ([UNET_TENSOR, CLIP_OF["sd15"]], "sd21", "holds a model of the family sd15, not sd21; leave the family out"),
        ([UNET_TENSOR, CLIP_OF["sdxl"]], None, r"has the text encoders \['conditioner.embedders.1.model.'\], which no"),
    ],
)
def test_a_file_of_something_else_is_named(names: list[str], name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^here {message}"):
        family_of_single_file(names, "here", name)


@pytest.mark.parametrize(
    ("names", "name", "published", "absent"),
    [
        (["joint_blocks.0.x_block.attn2.qkv.weight"], "sd3", "stabilityai/stable-diffusion-3.5-medium", 4),
        (["joint_blocks.0.x_block.attn.ln_k.weight"], "sd3", "stabilityai/stable-diffusion-3.5-large", 4),
        (["joint_blocks.0.x_block.mlp.fc1.bias"], "sd3", "stabilityai/stable-diffusion-3-medium-diffusers", 4),
        (
            ["joint_blocks.0.x", "first_stage_model.decoder.x", "text_encoders.clip_g.transformer.x"],
            "sd3",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            2,
        ),
        (["model.diffusion_model.double_blocks.0.x", "guidance_in.x", "vae.x"], "flux", FLUX_DEV, 2),
        (["transformer_blocks.0.x", "single_transformer_blocks.0.x", "guidance_embedder.x"], "flux", FLUX_DEV, 3),
        (["double_blocks.0.x"], "flux_schnell", "black-forest-labs/FLUX.1-schnell", 3),
        (["noise_refiner.0.x", "text_encoders.qwen3_4b.transformer.model.x"], "z_image", "Tongyi-MAI/Z-Image", 1),
    ],
)
def test_files_of_flow_models_may_lack_what_their_model_has(
    names: list[str], name: str, published: str, absent: int
) -> None:
    family = family_of_single_file(names, "here")
    assert (family.name, family.version(names).published) == (name, published)
    assert len(absent_from_file(family, names)) == absent


def test_published_models_are_those_that_diffusers_takes() -> None:
    # But for SD2.1, which Stability withdrew from where diffusers still looks for it.
    for family, model_type in (("sd15", "v1"), ("sdxl", "xl_base"), ("sdxl_refiner", "xl_refiner")):
        theirs = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[model_type]["pretrained_model_name_or_path"]
        assert FAMILIES[family].published == theirs
