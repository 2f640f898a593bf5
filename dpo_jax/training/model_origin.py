"""The base and the licence of an exported model, as its card and files state them, without paths of this machine."""

import datetime
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.models.families import License
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.weights.hub import HUB_ID

_LOCAL = re.compile(r"~[\w.-]*(/|$)|[A-Za-z]:[\\/]|/|\\\\\w|file:/")
"""Beginning of a path that has a meaning only on one machine."""


class Origin(NamedTuple):
    """The base of an exported model."""

    base_model: str | None
    """The hub id of the base, if it is known."""
    license: License | None
    remark: str = ""
    """Statement of what is unknown or assumed, and the flag that sets it."""


def origin_of(model: str, pipeline: Pipeline, license: str = "", base_model: str = "") -> Origin:
    """Return the origin of a model that was opened as `model`; the user may state `license` and `base_model`.

    Raises:
        UserError: these are not ids that model cards of the hub take.
    """
    named = HUB_ID.fullmatch(base_model)
    if base_model and (named is None or named["repo"] != base_model):
        raise UserError(f"--base_model={base_model} is not a hub id; give owner/name")
    if license and not re.fullmatch(r"[A-Za-z0-9.+-]+", license):
        raise UserError(
            f"--license={license} is not the hub's id of a licence, such as openrail++, apache-2.0 or other"
        )
    hub_id = HUB_ID.fullmatch(model)
    repo = hub_id["repo"] if hub_id and not epath.Path(model).expanduser().exists() else None
    base, family = base_model or repo, pipeline.family
    if license:
        known = license == family.license.id  # "other" also needs the name and link
        return Origin(base, family.license if known else License(license))
    if base in (family.published, *family.also_published):
        return Origin(base, family.license)
    what = f"{base}" if base else "the base model"
    if not pipeline.is_of_published_size:
        return Origin(base, None, f"The licence of {what} is unknown. State it with --license{_and_base(base)}.")
    return Origin(
        base,
        family.license,
        f"The licence is that of {pipeline.version.published}, the usual base of this family. If {what} has another, "
        f"state it with --license{_and_base(base)}.",
    )


def _and_base(base: str | None) -> str:
    return "" if base else ", and the base's hub id with --base_model"


def without_paths(value: Any) -> Any:
    """Return a JSON value in which paths of this machine are replaced by their last part."""
    if isinstance(value, Mapping):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def public_name(text: str) -> str:
    """Return a text with absolute paths replaced by their last part, also in lists such as `NAME=PATH:PATH`."""
    if _LOCAL.match(text) and not re.search("[=,;]", text):
        return _last_part(text)
    parts = re.split(r"([=,;\s'\"()]|(?<!\b[A-Za-z]):(?!//))", text)
    return "".join(_last_part(part) if _LOCAL.match(part) else part for part in parts)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path[:1]


def model_spec(facts: Mapping[str, Any], pipeline: Pipeline, format: str, title: str, origin: Origin) -> dict[str, str]:
    """Return the metadata of a .safetensors file by Stability's ModelSpec 1.0.0, which web UIs and hubs show.

    `facts` are those of `model_card`.
    """
    config = facts.get("config") or {}
    is_lora = format in ("lora", "kohya")
    size = config.get("data.resolution") or pipeline.trained_resolution
    # kohya's scripts and SwarmUI tell a LoRA by the ending; diffusers' names are another implementation's.
    is_original = format == "single" or (format == "kohya" and pipeline.family.original_layer_names)
    trained = f"Trained for {facts['step']} steps with dpo_jax" if config else "Converted by dpo_jax"
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": pipeline.marks.architecture + ("/lora" if is_lora else ""),
        "implementation": pipeline.marks.implementation if is_original else "diffusers",
        "title": title,
        "description": trained,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "resolution": f"{size}x{size}",
    }
    if not pipeline.schedule.is_flow:  # the specification has no value for it
        fields["prediction_type"] = "v" if pipeline.predicts_velocity else "epsilon"
    if origin.license:
        fields["license"] = origin.license.name or origin.license.id
    return {f"modelspec.{name}": value for name, value in fields.items()}
