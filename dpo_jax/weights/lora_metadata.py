"""The metadata of a LoRA file: the alpha of each layer if no tensor holds it, and the model that it was made for."""

import math
import os
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import pydantic
import regex
from etils import epath
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import conform, parse_json, read_json
from dpo_jax.streams import warn
from dpo_jax.weights import safetensors_file

T = TypeVar("T")

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
MADE_FOR = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")
MAX_CONFIG_BYTES = 2**26
SECONDS_TO_MATCH = 5.0
"""Time limit for matching all patterns of a file: a pattern from somebody else's file can take arbitrarily long."""
MAX_PATTERN = 10_000
_SIMPLE = re.compile(r"\^?[\w.-]*")
"""Patterns as diffusers and PEFT write them for single layers, up to a thousand per file; matching takes no time."""


class PeftConfig(TypedDict, total=False):
    """The fields of PEFT's LoraConfig that determine the strength of a LoRA; it has many more."""

    lora_alpha: pydantic.FiniteFloat
    alpha_pattern: Annotated[dict[str, pydantic.FiniteFloat], pydantic.Field(max_length=5000)] | None
    use_rslora: bool | None


class Stated:
    """The alphas that a file states in its metadata."""

    def __init__(self, path: epath.Path, has_alphas: bool = False):
        """Read the metadata of `path`; with `has_alphas`, tensors hold alpha, so a plain field with it is ignored."""
        self._path = path
        self.metadata: dict[str, str] = conform(
            safetensors_file.read_metadata(path), dict[str, str], f"{path}: the metadata"
        )
        self._configs: dict[str, tuple[PeftConfig, dict[regex.Pattern | re.Pattern, float]]] = {}
        self._fields, self._where = self._read_fields()
        self._seconds_left = SECONDS_TO_MATCH
        self._plain = None if has_alphas else self._read_plain()

    @property
    def made_for(self) -> str | None:
        """Name of the model that the LoRA is for, as the file gives it."""
        fields = self._fields | self.metadata
        return next((str(fields[key]) for key in MADE_FOR if fields.get(key)), None)

    def alpha(self, component: str, layer: str, rank: int) -> float:
        """Return the alpha of a layer for which no tensor holds one; the rank if the file states none.

        As in PEFT, the first pattern that matches the end of the layer's name counts, otherwise the value for all
        layers.
        """
        config, patterns = self._config(component)
        alpha = next((alpha for pattern, alpha in patterns.items() if self._fits(pattern, layer)), None)
        if alpha is None:
            alpha = config.get("lora_alpha", rank if self._plain is None else self._plain)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # PEFT then scales by alpha / sqrt(rank)

    def _read_fields(self) -> tuple[dict[str, Any], str]:
        """Return PEFT's LoraConfig: from the file's metadata, as diffusers writes it, or from the folder, as PEFT
        does."""
        where = f"{self._path}: the metadata {DIFFUSERS_METADATA}"
        if DIFFUSERS_METADATA in self.metadata:
            return conform(parse_json(self.metadata[DIFFUSERS_METADATA], where), dict[str, Any], where), where
        beside = self._path.parent / PEFT_CONFIG
        if self._path.name == FILES[1]:
            config: dict[str, Any] | None = None
            if beside.exists() or os.path.islink(beside):  # a broken link is an error
                config = read_json(beside, dict[str, Any], MAX_CONFIG_BYTES)
            if config is None or "lora_alpha" not in config:
                reason = "is missing" if config is None else "has no lora_alpha"
                warn(f"{beside} {reason}, which says how strong this LoRA is; alpha is taken to be its rank")
            return config or {}, str(beside)
        return {}, where

    def _config(self, component: str) -> tuple[PeftConfig, dict[regex.Pattern | re.Pattern, float]]:
        if component not in self._configs:
            own = {name.removeprefix(f"{component}."): value for name, value in self._fields.items()}
            config: PeftConfig = conform(own, PeftConfig, self._where)
            patterns = {self._compiled(text): alpha for text, alpha in (config.get("alpha_pattern") or {}).items()}
            self._configs[component] = config, patterns
        return self._configs[component]

    def _compiled(self, pattern: str) -> regex.Pattern | re.Pattern:
        if len(pattern) > MAX_PATTERN:
            raise UserError(f"{self._where}: a pattern of alpha_pattern has {len(pattern):,} characters")
        whole = rf"(.*\.)?({pattern})"
        if _SIMPLE.fullmatch(pattern):
            return re.compile(whole)
        try:
            return self._timed(lambda: regex.compile(whole))
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"{self._where}: alpha_pattern {pattern[:60]!r} is not a regular expression ({error})"
            ) from None

    def _fits(self, pattern: regex.Pattern | re.Pattern, layer: str) -> bool:
        if isinstance(pattern, re.Pattern):
            return pattern.fullmatch(layer) is not None
        return self._timed(lambda: pattern.fullmatch(layer, timeout=self._seconds_left)) is not None

    def _timed(self, call: Callable[[], T]) -> T:
        """Return the result of `call`; raise a UserError if the time limit is reached."""
        start = time.monotonic()
        try:
            if self._seconds_left > 0:
                return call()
        except TimeoutError:
            pass
        finally:
            self._seconds_left -= time.monotonic() - start
        raise UserError(
            f"{self._where}: its alpha_pattern takes longer than {SECONDS_TO_MATCH:g} seconds to match; write the "
            "names of the layers instead of complex regular expressions"
        )

    def _read_plain(self) -> float | None:
        """Return alpha from a separate metadata field, where some trainers write it as text; None if there is none."""
        for name in ("lora_alpha", "ss_network_alpha"):
            text = self.metadata.get(name)
            # kohya writes "None" for no value, and "Dynamic" if alpha differs between layers.
            if text is None or text in ("", "None", "Dynamic"):
                continue
            try:
                alpha = float(text)
            except ValueError:
                alpha = math.nan
            if not math.isfinite(alpha):
                raise UserError(f"{self._path}: the metadata {name}={text[:60]!r} is not a number")
            return alpha
        return None
