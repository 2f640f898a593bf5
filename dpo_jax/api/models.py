"""Loads models that are ready to draw, and writes models for other tools, as functions."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from dpo_jax import locks
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.sampling.loaded_model import LoadedModel
    from dpo_jax.training.export import Exportable


def load_model(
    source: str,
    *,
    step: int | str = "",
    lora: str = "",
    lora_scale: float = 1.0,
    dtype: str | None = None,
    vae_dtype: str | None = None,
    attention: str = "auto",
    fsdp: int = 1,
    allow_nonfinite: bool = False,
    **options: Any,
) -> "LoadedModel":
    """Return a model that is ready to draw with `sample`; weights are loaded when they are first needed.

        images = dpo_jax.load_model("runs/mine", step="best").sample("a red circle at the top left", seeds=4)

    Args:
        source: diffusers folder, hub id, single .safetensors file, or work directory of a training run.
        step: for a training run: the step whose checkpoint to load, "best", or "" for the newest.
        lora: LoRA to add: a file, its folder, or a hub id.
        lora_scale: factor of the LoRA.
        dtype: compute dtype; by default bfloat16, on CPUs float32. A training run has its own.
        vae_dtype: compute dtype of the VAE, if it differs.
        attention: kernel, as `config.attention`.
        fsdp: number of devices that one copy of the weights is split over.
        allow_nonfinite: load weights even if they hold NaN or infinity.
        options: `unet`, `transformer`, `vae`, `family`, `model_config`, `revision` and `variant`, as the flags of
            `dpo_jax.sample`.

    Raises:
        UserError: there is no such model, or its files cannot be used.
    """
    if is_run(source):
        given = {"dtype": dtype, "vae_dtype": vae_dtype, **options}
        for name, value in given.items():
            if value:
                raise UserError(f"{name}={value!r} goes with a model; the training run {source} has its own")
        from dpo_jax.training.run import open_run

        run = open_run(source, str(step), allow_nonfinite=allow_nonfinite)
        return run.load_model(lora=lora, lora_scale=lora_scale)
    if step != "":
        raise UserError(f"step={step} goes with a training run, and {source} is not the work directory of one")
    import jax

    from dpo_jax.models.execution import Execution
    from dpo_jax.sampling.loaded_model import open_model

    return open_model(
        source,
        lora=lora,
        lora_scale=lora_scale,
        dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        vae_dtype=vae_dtype,
        execution=Execution(attention=attention),
        fsdp=fsdp,
        allow_nonfinite=allow_nonfinite,
        **options,
    )


def is_run(source: str) -> bool:
    """Return whether a model's source is the work directory of a training run."""
    return (epath.Path(source) / "checkpoints").exists()


class Exported(NamedTuple):
    """The result of `export`."""

    path: epath.Path
    """The path that other tools open: a folder, or the file in it."""
    title: str
    """What was exported, for example "the model after step 2000"."""
    remarks: list[str]
    """One or two sentences each for whoever exports or opens the model."""
    url: str = ""
    """Address of the repository on the hub, if it was uploaded."""


def export(
    source: str,
    output: epath.PathLike,
    *,
    format: str = "diffusers",
    step: int | str = "",
    lora: str | None = None,
    dtype: str | None = None,
    license: str = "",
    base_model: str = "",
    max_shard_gb: float = 10.0,
    push_to_hub: str = "",
    hub_private: bool = True,
    allow_nonfinite: bool = False,
    **options: Any,
) -> Exported:
    """Write the model of a training run, or another model, to a new folder in the format of other tools.

        dpo_jax.export("runs/mine", "exported/mine", format="kohya", push_to_hub="me/mine")

    Args:
        source: work directory of a training run, diffusers folder, hub id or single .safetensors file.
        output: folder to write; it must not exist.
        format: "diffusers", "unet", "transformer", "single", "lora" or "kohya"; see `dpo_jax export --help`.
        step: for a training run: the step whose checkpoint to export, "best", or "" for the newest.
        lora: for a model: LoRA to merge or to rewrite.
        dtype: of all weights; by default float32 for trained models, otherwise as the files hold them.
        license: licence for the model card, by the hub's id; by default that of the base model.
        base_model: hub id of the base model, for the card.
        max_shard_gb: largest size of one file of weights.
        push_to_hub: OWNER/NAME of a new model repository on the hub, to which the folder is uploaded; needs a login.
        hub_private: whether that repository is private.
        allow_nonfinite: export weights that hold NaN or infinity, too.
        options: `unet`, `transformer`, `vae`, `family`, `model_config`, `revision` and `variant`, as the flags of
            `dpo_jax.export`.

    Raises:
        UserError: `output` exists, the model cannot be opened, the format cannot hold it, or the hub does not let this
            user write there. Nothing is written then. If the upload itself fails, the folder stays.
    """

    def read() -> "Exportable":
        from dpo_jax.training.export import exportable_model, exportable_run

        if is_run(source):
            return exportable_run(source, str(step), allow_nonfinite=allow_nonfinite)
        return exportable_model(source, lora=lora, allow_nonfinite=allow_nonfinite, **options)

    return write_exported(
        read,
        output,
        format=format,
        dtype=dtype,
        license=license,
        base_model=base_model,
        max_shard_gb=max_shard_gb,
        push_to_hub=push_to_hub,
        hub_private=hub_private,
    )


def write_exported(
    read: "Callable[[], Exportable]",
    output: epath.PathLike,
    *,
    format: str,
    dtype: str | None,
    license: str,
    base_model: str,
    max_shard_gb: float,
    push_to_hub: str,
    hub_private: bool,
) -> Exported:
    """Write what `read` returns to the new folder `output`, which is locked before; other arguments as for `export`."""
    output = epath.Path(output)
    with locks.locked(output.parent, "python -m dpo_jax.export", f".{output.name}.lock", what=output):
        from dpo_jax.training.export import export as write
        from dpo_jax.training.export import origin, remarks
        from dpo_jax.weights.hub_upload import check_upload, upload

        if push_to_hub:
            check_upload(push_to_hub, output)
        exportable = read()
        said = {"license": license, "base_model": base_model}
        shard = int(max_shard_gb * 10**9)
        path = write(exportable, output, format=format, dtype=dtype, max_shard_bytes=shard, repo=push_to_hub, **said)
        found = remarks(exportable, format, origin(exportable, **said))
        url = ""
        if push_to_hub:
            message = f"Upload {exportable.title}"
            url = upload(Path(output), push_to_hub, private=hub_private, message=message)
        return Exported(path, exportable.title, found, url)
