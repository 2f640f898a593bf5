"""What the rest of the program knows of a denoiser: the network that a family trains, whatever its architecture."""

from typing import Any, NamedTuple, Protocol


class DenoiserConfig(Protocol):
    """The properties that every denoiser's config has, beside its own fields."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it takes and predicts."""

    @property
    def context_features(self) -> int:
        """Width of `Conditioning.context_NLD`."""

    @property
    def pooled_features(self) -> int:
        """Width of what is added to the time embedding: the pooled caption and embedded time ids; 0 for nothing."""

    @property
    def size_multiple(self) -> int:
        """Number that divides height and width of the latents."""

    @property
    def trained_cells(self) -> int:
        """Height and width of the latents that the model was trained on."""

    @property
    def most_cells(self) -> int | None:
        """The largest height and width of the latents that it has positions for; None for any."""


DENOISER_PREFIX = "model.diffusion_model."
"""Prefix of the denoiser's names in a single file of the whole model in the original layout."""


class Denoiser(NamedTuple):
    """An architecture of denoisers: its class, and the names that it has in folders and files."""

    folder: str
    """Its folder, and diffusers' name of the component: "unet" or "transformer"."""
    module: Any
    """The class, called with its config, `execution`, `dtype` and `rngs`.

    Its call takes latents x_NHWC, timesteps t_N from 0 to the last training timestep, and a `Conditioning`, and returns
    the prediction_NHWC of the schedule's target.
    """
    config: Any
    """Its config, a `DenoiserConfig` with `from_dict(config_json, where)`."""
    kind: str
    """What `weights.file_kinds.kind_of` says of files that hold it."""
    is_alone_in_files: bool = False
    """True if files of the original layout hold it alone, without a prefix; False if they hold the whole model."""

    @property
    def class_name(self) -> str:
        """The class in PyTorch diffusers."""
        return self.module.__name__


OTHER_PROGRAMS = {
    "unet": {
        "lora": "This file is for diffusers, PEFT and OneTrainer. Web UIs (ComfyUI, AUTOMATIC1111, Forge) do not read "
        "its names; --format=kohya writes one file for them and for diffusers.",
        "kohya": "This file is for web UIs (ComfyUI, AUTOMATIC1111, Forge); diffusers and OneTrainer open it too.",
    },
    "transformer": {
        "lora": "This file is for diffusers, PEFT, OneTrainer and ComfyUI; --format=kohya writes one for Forge and "
        "kohya's scripts.",
        "kohya": "This file is for web UIs (ComfyUI, Forge) and kohya's scripts. diffusers opens such files of FLUX.1 "
        "and Z-Image, but not of SD3; --format=lora writes one for it.",
    },
}
"""Which programs read a LoRA of a denoiser, by its component's name and the format."""
