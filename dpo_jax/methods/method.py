"""What a method is: a loss, and everything that the rest of dpo_jax needs to know about it.

Commands, `--help`, plan, config.json, model card and documentation read this object; none of them knows a method by its
name. `dpo.py` is the example to copy.

Axes: B prompts, K candidates of a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.metrics import Metrics, list_metrics, pair_metrics
from dpo_jax.methods.stability import PAIR_FIELDS, running_numbers, stabilised, stability_metrics

LearnsFrom = Literal["pairs", "lists", "images", "votes", "rollouts"]
"""What a method learns from: pairs of a winner and a loser; lists of candidates, best first; preferred images alone;
single images, each liked or disliked; or images that the model draws itself, in rounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to learn from preferences."""

    name: str
    """Value of `loss.name` that chooses it."""
    title: str
    """Its name in prose."""
    paper: str = ""
    """Number of its arXiv paper, for example "2311.12908"; "" if it has none."""
    loss: Callable[..., jax.Array]
    """`loss(inputs, **fields) -> loss_B`, unreduced. What it does not read of `LossInputs` is not computed."""
    learns_from: LearnsFrom = "pairs"
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the loss: `fields["beta"]` is the config's `loss.beta`, and reaches the loss as `beta`."""
    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of other fields, by dotted path, that choosing the method sets."""
    margin_scale: str = ""
    """The field that multiplies the margin of a pair, for `loss.auto_beta`; "" if there is none."""
    needs_reference: bool | Callable[[Mapping[str, Any]], bool] = True
    """Whether a frozen reference network is kept in memory and evaluated; it may depend on the config's fields."""
    num_candidates: int | None = None
    """Number of candidates that enter the step, the best ones; None for all."""
    reads_advantages: bool = False
    """Whether it learns from the advantages of rewards, and not from which candidate is preferred; rollouts only."""
    reads_transitions: bool = True
    """Whether it learns from the steps that drew an image, which must add noise; otherwise from the image alone, after
    noise is added again, so that any sampler may draw it. Rollouts only."""
    reads_old_means: Callable[[Mapping[str, Any]], bool] = lambda fields: False
    """Whether, with a config's fields, it reads the means of the steps of the policy that sampled, which are then
    stored. Rollouts only."""
    shares_noise: bool = False
    """Whether all candidates of a prompt get the same noise where it does not read transitions."""
    old_decay: Callable[[Mapping[str, Any], jax.Array], jax.Array] | None = None
    """`old_decay(config, updates)`: how much of the policy that draws the images remains at the end of a round, the
    rest of which the trained policy replaces. None if the trained policy itself draws. Rollouts only."""
    over_whole_batch: bool = False
    """Whether the loss of a prompt depends on others. Then it sees the whole batch, over all devices and micro-batches,
    which costs a second evaluation of the policy if there are several micro-batches; and it must be a function of
    errors and log-ratios."""
    reads_log_ratios_alone: bool = False
    """Whether the loss is a function of log-ratios and preferences alone, so that its value before the first update is
    known."""
    running: Mapping[str, Callable[[LossInputs], jax.Array]] = dataclasses.field(default_factory=dict)
    """Numbers, one per prompt, whose running means over earlier steps the loss reads as `inputs.running[name]`; they
    are 0 in the first step, and part of a checkpoint."""
    metrics: Callable[..., Metrics] | None = None
    """`metrics(inputs, **fields)` -> numbers to watch by name, one per prompt. None takes `list_metrics` if it learns
    from lists, otherwise `pair_metrics`."""
    held_out_metrics: Callable[[LossInputs], Metrics] | None = None
    """Numbers to watch on held-out data, one per example; None as for `metrics`. They see one batch of many, and no
    running means."""
    problem: Callable[[Mapping[str, Any]], str | None] = lambda fields: None
    """Return what is wrong with a config, given by its fields, as a sentence; None if nothing is."""

    @property
    def citation(self) -> str:
        """The title, as a Markdown link to the paper."""
        return f"[{self.title}](https://arxiv.org/abs/{self.paper})" if self.paper else self.title

    @property
    def takes_pair_fields(self) -> bool:
        """Whether the plug-ins of `stability.py` apply: it compares log-ratios of pairs, each pair on its own."""
        return self.learns_from == "pairs" and self.needs_reference is True and not self.over_whole_batch

    @property
    def unit(self) -> str:
        """What an example is called."""
        units = {"images": "images", "votes": "votes", "lists": "prompts", "rollouts": "prompts"}
        return units.get(self.learns_from, "pairs")

    def images_per_example(self, config: Mapping[str, Any]) -> int:
        """Return the number of images of an example, with padding, that runs with these fields read."""
        candidates = {"lists": "data.candidates", "rollouts": "online.candidates"}
        if self.learns_from == "votes":
            return 1
        return config.get(candidates.get(self.learns_from, ""), 2)

    def keeps_reference(self, config: Mapping[str, Any]) -> bool:
        """Whether a run with these fields keeps a reference network."""
        needs_reference = self.needs_reference
        return needs_reference(config) if callable(needs_reference) else needs_reference

    def objective(self, config: Mapping[str, Any]) -> "Objective":
        """Return the loss with the hyperparameters that a config, given by its fields, has, else with the defaults."""
        values = {name: config.get(f"loss.{name}", field.default) for name, field in self.fields.items()}
        loss: Callable[[LossInputs], jax.Array] = partial(self.loss, **values)
        usual_metrics = list_metrics if self.learns_from == "lists" else pair_metrics
        metrics: Callable[[LossInputs], Metrics] = partial(self.metrics or usual_metrics, **values)
        running = dict(self.running)
        if self.takes_pair_fields:
            plugins = {name: config.get(f"loss.{name}", field.default) for name, field in PAIR_FIELDS.items()}
            loss = stabilised(self.loss, values, plugins, self.margin_scale)
            running |= running_numbers(plugins)
            metrics = stability_metrics(metrics, plugins, values.get(self.margin_scale, 1.0))
        return Objective(
            loss=loss,
            needs_reference=self.keeps_reference(config),
            num_candidates=self.num_candidates,
            over_whole_batch=self.over_whole_batch,
            reads_log_ratios_alone=self.reads_log_ratios_alone,
            running=running,
            metrics=metrics,
            held_out_metrics=self.held_out_metrics or usual_metrics,
        )


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method with its hyperparameters, as the training step takes it; see `Method`."""

    loss: Callable[[LossInputs], jax.Array]
    """Maps inputs to loss_B."""
    needs_reference: bool = True
    num_candidates: int | None = None
    over_whole_batch: bool = False
    reads_log_ratios_alone: bool = False
    running: Mapping[str, Callable[[LossInputs], jax.Array]] = dataclasses.field(default_factory=dict)
    metrics: Callable[[LossInputs], Metrics] = pair_metrics
    """Maps inputs to numbers to watch, one per prompt."""
    held_out_metrics: Callable[[LossInputs], Metrics] = pair_metrics

    def loss_at_reference(self) -> float | None:
        """Return the loss of a clear pair while the policy is the reference; None if it depends on more."""
        if not self.reads_log_ratios_alone:
            return None
        error_BK, image_BKHWC = jnp.ones((1, 2)), jnp.ones((1, 2, 1, 1, 1))
        pair = LossInputs(
            jnp.zeros((1, 2)),
            preference_BK=jnp.array([[1.0, 0.0]]),
            valid_BK=jnp.ones((1, 2), bool),
            weight_B=jnp.ones(1),
            error_BK=error_BK,
            reference_error_BK=error_BK,
            log_snr_B=jnp.zeros(1),
            prediction_BKHWC=image_BKHWC,
            reference_prediction_BKHWC=image_BKHWC,
            target_BKHWC=jnp.zeros_like(image_BKHWC),
            running=self.no_means(),
        )
        return float(self.loss(pair)[0])

    def no_means(self) -> dict[str, jax.Array]:
        """Return the running means before the first step."""
        return {name: jnp.zeros(()) for name in self.running}
