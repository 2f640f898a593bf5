"""Optimizers and learning-rate schedules that match those of PyTorch and transformers.

They are optax transformations of a flat dict of parameters. Every state array is kept in a dict under its parameter's
name and has its parameter's rank, so that a sharding rule written for the parameter serves its state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.errors import UserError
from dpo_jax.weights.layout import Params, Specs

POLYNOMIAL_END = 1e-7
"""The learning rate that diffusers' `polynomial` falls to."""


def learning_rate_schedule(
    name: str, learning_rate: float, *, warmup_steps: int, total_steps: int, cycles: int = 1, power: float = 1.0
) -> optax.Schedule:
    """Return the learning rate as a function of the steps already made, as in `diffusers.optimization.get_scheduler`.

    `constant` ignores the other arguments. All others rise linearly from 0, so that the very first step changes
    nothing, then stay (`constant_with_warmup`), or fall until `total_steps`: to 0 along a line (`linear`), half a
    cosine (`cosine`) or several of them one after the other (`cosine_with_restarts`: `cycles`); or to 1e-7 along
    `(1 - progress) ** power` (`polynomial`).
    """
    end = min(1.0, POLYNOMIAL_END / learning_rate)  # as a share of the learning rate
    falls = {
        "constant_with_warmup": lambda progress: 1.0,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
        "cosine_with_restarts": lambda progress: jnp.where(
            progress < 1, (1 + jnp.cos(jnp.pi * (cycles * progress % 1))) / 2, 0
        ),
        "polynomial": lambda progress: end + (1 - end) * (1 - progress) ** power,
    }
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    if name not in falls:
        raise UserError(f"{name!r} is not a learning-rate schedule; choose one of {', '.join(['constant', *falls])}")

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, float)  # an int32 would be divided in float32 even under x64
        rise = jnp.minimum(1, step / warmup_steps) if warmup_steps else 1.0
        progress = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0, 1)
        return learning_rate * rise * falls[name](progress)

    return schedule


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    specs: Specs,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW or Adafactor with decoupled weight decay times the learning rate.

    Args:
        name: `adamw` (arXiv 1711.05101, as `torch.optim.AdamW`) or `adafactor` (arXiv 1804.04235, as
            `transformers.Adafactor` with `scale_parameter`, `relative_step` and `warmup_init` off).
        learning_rate: see `learning_rate_schedule`.
        specs: the trained parameters; Adafactor reads their PyTorch layout.
        beta1: AdamW only, as are beta2 and epsilon.
        beta2: decay of the second moment.
        epsilon: added to its square root.
        weight_decay: fraction of a parameter taken off per step and unit of learning rate.
        clip_norm: largest global gradient norm; infinity for none.
    """
    preconditioners = {
        "adamw": optax.scale_by_adam(beta1, beta2, epsilon),
        "adafactor": scale_by_adafactor(specs),
    }
    if name not in preconditioners:
        raise UserError(f"{name!r} is not an optimizer; choose one of {', '.join(preconditioners)}")
    return optax.chain(
        clip_by_global_norm(clip_norm),
        preconditioners[name],
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_norm_`: gradients times `min(1, max_norm / (norm + 1e-6))`.

    optax's own has no 1e-6, which shows in comparisons.
    """

    def update(grads: Params) -> Params:
        coefficient = jnp.minimum(1, max_norm / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda grad: grad * coefficient, grads)

    return optax.stateless(lambda grads, params: update(grads))


class AdafactorState(NamedTuple):
    """Running means of the squared gradient: `row` and `col` for factored parameters, `full` for vectors."""

    step: jax.Array
    row: Params
    """The mean over the last PyTorch axis, kept with size 1."""
    col: Params
    """The mean over the second last PyTorch axis, kept with size 1."""
    full: Params


def scale_by_adafactor(
    specs: Specs, *, decay_rate: float = -0.8, epsilon: float = 1e-30, clip_threshold: float = 1.0
) -> optax.GradientTransformation:
    """Adafactor's preconditioner as `transformers.Adafactor` computes it (arXiv 1804.04235, algorithm 4).

    The second moment of every parameter of two axes or more is factored over the last two axes of its PyTorch layout:
    height and width for a convolution. `optax.adafactor` would factor the two largest axes of at least 128, which is
    another optimizer. There is no first moment.
    """
    factored_axes = {name: spec.torch_axes[-2:] for name, spec in specs.items() if len(spec.shape) >= 2}

    def zeros(params: Params, which: int) -> Params:
        shapes = {name: list(params[name].shape) for name in factored_axes}
        for name, axes in factored_axes.items():
            shapes[name][axes[which]] = 1
        return {name: jnp.zeros(shape, params[name].dtype) for name, shape in shapes.items()}

    def init(params: Params) -> AdafactorState:
        full = {name: jnp.zeros_like(param) for name, param in params.items() if name not in factored_axes}
        return AdafactorState(jnp.zeros((), jnp.int32), row=zeros(params, -1), col=zeros(params, -2), full=full)

    def update(grads: Params, state: AdafactorState, params: Params | None = None) -> tuple[Params, AdafactorState]:
        step = state.step + 1
        new_state = AdafactorState(step, {}, {}, {})
        updates = {}
        for name, grad in grads.items():
            decay = 1 - step.astype(grad.dtype) ** decay_rate
            square = jnp.square(grad) + epsilon
            if name in factored_axes:
                penultimate, last = factored_axes[name]
                row = decay * state.row[name] + (1 - decay) * square.mean(last, keepdims=True)
                col = decay * state.col[name] + (1 - decay) * square.mean(penultimate, keepdims=True)
                new_state.row[name], new_state.col[name] = row, col
                scaled = grad * jax.lax.rsqrt(row / row.mean(penultimate, keepdims=True)) * jax.lax.rsqrt(col)
            else:
                full = decay * state.full[name] + (1 - decay) * square
                new_state.full[name] = full
                scaled = grad * jax.lax.rsqrt(full)
            rms = jnp.sqrt(jnp.square(scaled).mean())
            updates[name] = scaled / jnp.maximum(1, rms / clip_threshold)
        return updates, new_state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
