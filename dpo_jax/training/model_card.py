"""The model card (README.md) of an export: what the model is, how to open it, how it was made, and its results."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired

import pydantic
from etils import epath
from huggingface_hub import ModelCardData
from typing_extensions import TypedDict

from dpo_jax import __version__
from dpo_jax.files import conform, read_json
from dpo_jax.methods import METHODS
from dpo_jax.models.families import DENOISERS
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.models.save import unlike_published
from dpo_jax.training.figures import SAMPLES, is_by_noise
from dpo_jax.training.model_origin import Origin, public_name, without_paths

USE = {
    "diffusers": "pipe = diffusers.DiffusionPipeline.from_pretrained({folder!r}{dtype})",
    "denoiser": (
        "{denoiser} = diffusers.{denoiser_class}.from_pretrained({folder!r}{dtype})\n"
        "pipe = diffusers.{base}, {denoiser}={denoiser}{dtype})"
    ),
    "single": "pipe = diffusers.{pipeline}.from_single_file({file!r}{dtype})",
    "denoiser in a file": (
        "{denoiser} = diffusers.{denoiser_class}.from_single_file(\n"
        "    {file!r}, config={whole!r}, subfolder={denoiser!r}{dtype}\n)\n"
        "pipe = diffusers.{base}, {denoiser}={denoiser}{dtype})"
    ),
    "lora": "pipe = diffusers.{base})\npipe.load_lora_weights({folder!r})",
    "kohya": "pipe = diffusers.{base})\npipe.load_lora_weights({folder!r}, weight_name={name!r})",
}


def model_card(
    facts: Mapping[str, Any],
    pipeline: Pipeline,
    format: str,
    name: str,
    dtype: str,
    origin: Origin,
    remarks: Sequence[str] = (),
    repo: str = "",
) -> str:
    """Return the text of README.md, with front matter for the hub and without paths of this machine.

    Args:
        facts: for a training run, `config` (as in config.json), `step`, `validation` (its figures at that step),
            `scores` (of its image grid, if a judge gave any) and `result` (of `dpo_jax.evaluate`, or None); for a
            converted model, `model` and perhaps `lora`.
        pipeline: the model.
        format: one of the formats of `dpo_jax.export`.
        name: name of the folder.
        dtype: dtype of the weights.
        origin: base model and licence.
        remarks: sentences for whoever opens the model.
        repo: OWNER/NAME on the hub, where the model is to be opened from; "" for the folder `name`.
    """
    config = facts.get("config")
    source = config["model"] if config else facts["model"]
    model, license = public_name(source), origin.license
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license.id if license else None,
        license_name=(license.name or None) if license else None,
        license_link=(license.link or None) if license else None,
        base_model=origin.base_model,
        tags=[
            "text-to-image",
            *([config["loss.name"].rpartition(":")[2]] if config else []),
            "dpo_jax",
            *(["lora"] if _is_lora(format) else []),
        ],
    )
    settings = ", ".join(f"`{field}={value}`" for field, value in _scheduler(pipeline).items())
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo.rpartition('/')[2] or name}\n",
        f"```python\n{_code(pipeline, source, format, name, dtype, repo)}\n```\n",
    ]
    remarks = [*remarks, *([pipeline.family.note] if pipeline.family.note else [])]
    parts += [f"Scheduler: {pipeline.schedule.class_name}, {settings}.\n", *(f"{remark}\n" for remark in remarks)]
    if not config:
        with_lora = f" with {public_name(facts['lora'])}" if facts.get("lora") else ""
        return "\n".join([*parts, f"Converted from {model}{with_lora} by dpo_jax {__version__}.\n"])
    what = "A LoRA" if config["lora.rank"] or config["lora.init"] else f"All weights of the {pipeline.denoiser_name}"
    others = "".join(
        f", with the {part} of {public_name(config[part])}" for part in (*DENOISERS, "vae") if config.get(part)
    )
    method, step = _method(config["loss.name"]), facts["step"]
    version = f" {config['dpo_jax_version']}" if "dpo_jax_version" in config else ""  # runs of 0.1.0 may have none
    parts.insert(1, f"{what} of {model}{others}, trained by {method} for {step} steps with dpo_jax{version}.\n")
    if facts.get("result"):
        parts.append("## Measured\n\n" + "\n".join(_measured(facts["result"])) + "\n")
    parts += _figures("Held-out pairs", facts["validation"], "validation/", step)
    parts += _figures("Scores of samples drawn in training", facts.get("scores", {}), SAMPLES, step)
    parts.append(f"## Config\n\n```json\n{json.dumps(without_paths(config), indent=2)}\n```\n")
    return "\n".join(parts)


def _code(pipeline: Pipeline, source: str, format: str, name: str, dtype: str, repo: str) -> str:
    """Return the Python that opens an export of a model that came from `source`; the rest is as in `model_card`."""
    is_single, is_flow = ".safetensors" in source, pipeline.schedule.is_flow
    # A file of a flow model may lack text encoders, which diffusers does not look for elsewhere.
    whole = pipeline.version.published if is_single and is_flow else public_name(source)
    # By default diffusers opens half-precision weights in float32, and transformers does not.
    is_half = dtype != "float32" and not _is_lora(format)
    kind = "denoiser" if format in DENOISERS else format
    if format == "single" and pipeline.family.denoiser.is_alone_in_files:
        kind = "denoiser in a file"
    use = USE[kind].format(
        folder=repo or name,
        name=f"{name}.safetensors",
        file=f"https://huggingface.co/{repo}/blob/main/{name}.safetensors" if repo else f"{name}/{name}.safetensors",
        base=f"{pipeline.class_name}.from_{'single_file' if is_single and not is_flow else 'pretrained'}({whole!r}",
        whole=whole,
        pipeline=pipeline.class_name,
        denoiser=pipeline.denoiser_name,
        denoiser_class=pipeline.family.denoiser.class_name,
        dtype=f", torch_dtype=torch.{dtype}" if is_half else "",
    )
    # diffusers opens a single file with the scheduler of the published model.
    is_unlike = any(unlike_published(pipeline).values()) or (is_flow and kind == "single")
    if is_unlike and (format == "single" or (is_single and format != "diffusers")):
        arguments = ", ".join(f"{field}={value!r}" for field, value in _scheduler(pipeline).items())
        scheduler = pipeline.schedule.class_name
        use += f"\npipe.scheduler = diffusers.{scheduler}.from_config(pipe.scheduler.config, {arguments})"
    imports = "import diffusers\nimport torch\n" if is_half else "import diffusers\n"
    return f"{imports}\n{use}"


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    """Return the noise schedule under the names of diffusers' fields."""
    if pipeline.schedule.is_flow:
        shifts = ("shift", "use_dynamic_shifting", "base_shift", "max_shift")
        return {name: pipeline.scheduler_config[name] for name in shifts if name in pipeline.scheduler_config}
    fields: dict[str, Any] = {"prediction_type": "v_prediction" if pipeline.predicts_velocity else "epsilon"}
    if pipeline.ends_in_noise:
        fields["rescale_betas_zero_snr"] = True
    if pipeline.schedule.timestep_spacing:
        fields["timestep_spacing"] = pipeline.schedule.timestep_spacing
    return fields


def _figures(title: str, figures: Mapping[str, float], prefix: str, exported: int) -> list[str]:
    """Return the section about the figures with a prefix, of all noise levels together; empty without figures."""
    rows = [
        f"| {name.removeprefix(prefix)} | {value:.6g} |"
        for name, value in figures.items()
        if name.startswith(prefix) and not is_by_noise(name)
    ]
    table = "\n".join(["| metric | value |", "|---|---|", *rows])
    return [f"## {title}\n\n{_when(figures.get('step'), exported)}\n\n{table}\n"] if rows else []


def _when(measured: float | None, exported: int) -> str:
    """Return a sentence with the step of the figures, which may differ from that of the weights."""
    if measured is None:
        return "The step of these figures is unknown."
    if measured == exported:
        return f"Measured after step {exported}, on these weights."
    return f"Measured after step {measured:.0f}; the weights here are those after step {exported}."


def _measured(result: Mapping[str, Any]) -> list[str]:
    """Return lines about a comparison with the base, or about the rounds of online learning."""
    if "rounds" in result:
        first, last = (result["rounds"][end] for end in (0, -1))
        return [
            f"- {public_name(judge)}, mean score of the images sampled in training: "
            f"{first['scores'][judge]['mean']:.4g} in the first round, {score['mean']:.4g} in the last, after "
            f"{last['images']} images"
            for judge, score in last["scores"].items()
            if judge in first["scores"]
        ]
    models = result.get("settings", {}).get("models", {})
    return [
        *(f"- measured on {name}: {fingerprint}" for name, fingerprint in models.items()),
        f"- win rate over the base: {result['win_rate']:.1%}, 95% confidence interval [{result['win_rate_low']:.1%}, "
        f"{result['win_rate_high']:.1%}], {result['comparisons']} comparisons, {result['ties']} ties count 1/2",
        f"- judge's mean score: base {result['base_score']:.4g}, tuned {result['tuned_score']:.4g}",
    ]


class _Comparison(TypedDict):
    """The part of the result of `dpo_jax.evaluate` that a card shows."""

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    comparisons: int
    ties: float
    base_score: float
    tuned_score: float
    settings: NotRequired["_Settings"]


class _Settings(TypedDict):
    models: NotRequired[dict[str, str]]


class _Score(TypedDict):
    mean: float


class _Round(TypedDict):
    images: float
    scores: dict[str, _Score]


class _Rounds(TypedDict):
    """The part of the result of `dpo_jax.online` that a card shows."""

    rounds: Annotated[list[_Round], pydantic.Field(min_length=1)]


def read_result(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Return the result that `dpo_jax.evaluate` or `dpo_jax.online` wrote, or None; UserError if it is damaged."""
    path = epath.Path(workdir) / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = read_json(path, dict[str, Any])
    conform(result, _Rounds if "rounds" in result else _Comparison, str(path))
    return result


def _method(name: str) -> str:
    """Return the method's title and paper; one of the user's own is named, but its code is not imported."""
    return METHODS[name].citation if name in METHODS else f"the method `{name.removeprefix('python=')}`"


def _is_lora(format: str) -> bool:
    return format in ("lora", "kohya")
