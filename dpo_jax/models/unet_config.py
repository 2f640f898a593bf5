"""The config.json of a diffusers UNet2DConditionModel."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from dpo_jax.errors import UserError
from dpo_jax.models.config_json import Depth, Positive, Width, read_config


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields that decide a UNet's shape or its use; the names and defaults are those of diffusers.

    The tuples have one entry per level, finest resolution first. If a config.json gives one number for all levels,
    `from_dict` repeats it.
    """

    sample_size: Annotated[int, pydantic.Field(ge=1, le=1024)] | None = None
    """Height and width of the latents that the model was trained on, the smaller of the two; any size can be used."""
    in_channels: Width = 4
    out_channels: Width = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    """Coarsest resolution first, which is the order in which they run."""
    block_out_channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[Depth, ...] = (2, 2, 2, 2)
    norm_num_groups: Width = 32
    norm_eps: Positive = 1e-5
    cross_attention_dim: tuple[Width, ...] = (1280, 1280, 1280, 1280)
    transformer_layers_per_block: tuple[Depth, ...] = (1, 1, 1, 1)
    attention_head_dim: tuple[Width, ...] = (8, 8, 8, 8)
    """The number of attention heads. The name is wrong, but diffusers keeps it because all published configs use it."""
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    """"text_time" (SDXL): the pooled caption and the size conditioning are added to the time embedding."""
    addition_time_embed_dim: Width | None = None
    """Features of each time id."""
    projection_class_embeddings_input_dim: Width | None = None
    """Width of the pooled caption plus that of all embedded time ids."""

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def context_features(self) -> int:
        return self.cross_attention_dim[0]

    @property
    def pooled_features(self) -> int:
        return self.projection_class_embeddings_input_dim or 0

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def trained_cells(self) -> int:
        return self.sample_size or 64

    @property
    def most_cells(self) -> int | None:
        return None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> "UNetConfig":
        """Read a config.json. Raises a UserError that names `where` and the field that is not supported."""
        channels = config.get("block_out_channels", cls.block_out_channels)
        levels = len(channels) if isinstance(channels, list | tuple) and len(channels) <= MAX_LEVELS else 1
        repeated = {}
        for name in _PER_LEVEL:
            value = config.get(name, getattr(cls, name)[0])
            repeated[name] = value if isinstance(value, list | tuple) else [value] * levels
        repeated["sample_size"] = _side(config.get("sample_size"))
        supported = _SUPPORTED | {"only_cross_attention": (False, [False] * levels)}
        result = read_config(cls, {**config, **repeated}, where, supported=supported, metadata=_METADATA)
        result._check(where)
        return result

    def _check(self, where: str) -> None:
        levels = len(self.block_out_channels)
        if not 1 <= levels <= MAX_LEVELS:
            raise UserError(f"{where}: block_out_channels has {levels} levels; a UNet has 1 to {MAX_LEVELS}")
        for name in (*_PER_LEVEL, "down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise UserError(
                    f"{where}: {name} = {getattr(self, name)} does not fit the {levels} levels of "
                    f"block_out_channels = {self.block_out_channels}"
                )
        layers = zip(self.layers_per_block, self.transformer_layers_per_block, strict=True)
        total = sum(resnets * (1 + transformers) for resnets, transformers in layers)
        if total > MAX_LAYERS:
            raise UserError(
                f"{where}: layers_per_block = {self.layers_per_block} and transformer_layers_per_block = "
                f"{self.transformer_layers_per_block} make {total} layers; at most {MAX_LAYERS} are supported"
            )
        for name, choices in _BLOCKS.items():
            for block in getattr(self, name):
                if block not in choices:
                    raise UserError(f"{where}: {block!r} in {name} is not supported, only {' or '.join(choices)}")
        for width, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True):
            if width % heads:
                raise UserError(
                    f"{where}: block_out_channels = {self.block_out_channels} do not divide into "
                    f"attention_head_dim = {self.attention_head_dim} heads"
                )
            if width % self.norm_num_groups:
                raise UserError(
                    f"{where}: block_out_channels = {self.block_out_channels} do not divide into "
                    f"norm_num_groups = {self.norm_num_groups} groups"
                )
        if self.block_out_channels[0] % 2 or (self.addition_time_embed_dim or 0) % 2:
            raise UserError(
                f"{where}: the first of block_out_channels = {self.block_out_channels} and addition_time_embed_dim = "
                f"{self.addition_time_embed_dim} must be even: half are sines and half are cosines"
            )
        if self.addition_embed_type not in (None, "text_time"):
            raise UserError(
                f"{where}: addition_embed_type = {self.addition_embed_type!r} is not supported, "
                "only None or 'text_time'"
            )
        if self.addition_embed_type is None and self.projection_class_embeddings_input_dim is not None:
            raise UserError(
                f"{where}: projection_class_embeddings_input_dim = {self.projection_class_embeddings_input_dim} "
                "needs addition_embed_type = 'text_time'"
            )
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type == "text_time" and None in sizes:
            raise UserError(
                f"{where}: addition_embed_type = 'text_time' needs addition_time_embed_dim and "
                f"projection_class_embeddings_input_dim, not {sizes}"
            )


def _side(sample_size: Any) -> Any:
    """Return one number for [height, width], and 64 for 64.0; anything else is returned unchanged."""
    sides = list(sample_size) if isinstance(sample_size, list | tuple) and len(sample_size) == 2 else [sample_size]
    sides = [int(side) if isinstance(side, float) and side.is_integer() else side for side in sides]
    return min(sides) if all(isinstance(side, int) for side in sides) else sample_size


MAX_LEVELS = 8
MAX_LAYERS = 256
"""Maximum number of layers on the way down; SDXL has 32, the most that is published. Building more takes minutes."""

_PER_LEVEL = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim")

_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}

# Fields that have no other value in any Stable Diffusion checkpoint.
_SUPPORTED: dict[str, Any] = {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # SD2.1 asks for float32 attention scores; `attention.attention` always accumulates them in float32 or wider.
    "upcast_attention": (None, False, True),
}

# The first one belongs to an unsupported addition_embed_type, the others to legacy Flax checkpoints.
_METADATA = ("addition_embed_type_num_heads", "dtype", "split_head_dim", "use_memory_efficient_attention")
