"""Optimizers and learning-rate schedules that match those of PyTorch and transformers.

They are optax transformations of a flat dict of parameters. Every state array is a number, or is kept in a dict under
its parameter's name and has its parameter's rank, so that a sharding rule written for the parameter serves its state.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.errors import UserError
from dpo_jax.training.moments import with_stored_moments
from dpo_jax.training.rounding import widened
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


OPTIMIZERS = {"adamw": "AdamW", "adafactor": "Adafactor", "lion": "Lion", "muon": "Muon", "prodigy": "Prodigy"}
"""The titles of the optimizers, by the name that a config has."""
WITH_MOMENTS = ("adamw", "lion", "muon")
"""The optimizers whose moments may be stored in fewer bits."""


def beta2_of(name: str, beta2: float) -> float:
    """Return `optimizer.beta2` of a config; for -1 that of the optimizer's paper."""
    return beta2 if beta2 >= 0 else 0.99 if name == "lion" else 0.999


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    specs: Specs,
    *,
    beta1: float = 0.9,
    beta2: float = -1.0,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
    clip_norm: float = 1.0,
    moments: str = "float32",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Clip by the global norm, then the optimizer with decoupled weight decay times the learning rate.

    Everything is computed in float32, and so are the updates, also for weights and gradients in bfloat16.

    Args:
        name: one of `OPTIMIZERS`.
            `adamw` (arXiv 1711.05101) is `torch.optim.AdamW`.
            `adafactor` (arXiv 1804.04235) is `transformers.Adafactor` with `scale_parameter`, `relative_step` and
            `warmup_init` off.
            `lion` (arXiv 2302.06675): steps are signs, so its rate is 3 to 10 times smaller than that of AdamW.
            `muon`: `scale_by_muon`.
            `prodigy` (arXiv 2306.06101): AdamW that finds its rate and multiplies it by `learning_rate`, usually 1.
        learning_rate: see `learning_rate_schedule`.
        specs: the trained parameters; Adafactor and Muon read their PyTorch layout.
        beta1: decay of the first moment; not of Adafactor, nor of the matrices of Muon.
        beta2: decay of the second moment, of Lion's momentum; -1 as in `beta2_of`. Adafactor does not read it.
        epsilon: added to the square root of the second moment of AdamW, Prodigy and Muon's Adam.
        weight_decay: fraction of a parameter taken off per step and unit of learning rate.
        clip_norm: largest global gradient norm; infinity for none.
        moments: what the moments of `WITH_MOMENTS` are stored as; see `moments.with_stored_moments`.
        seed: of the rounding of moments.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"{name!r} is not an optimizer; choose one of {', '.join(OPTIMIZERS)}")
    beta2 = beta2_of(name, beta2)
    clip = clip_by_global_norm(clip_norm)
    if name == "prodigy":
        return in_float32(optax.chain(clip, prodigy(learning_rate, beta1, beta2, epsilon, weight_decay)))
    preconditioners = {
        "adamw": optax.scale_by_adam(beta1, beta2, epsilon),
        "adafactor": scale_by_adafactor(specs),
        "lion": optax.scale_by_lion(beta1, beta2),
        "muon": scale_by_muon(specs, adam=optax.scale_by_adam(beta1, beta2, epsilon)),
    }
    return in_float32(
        optax.chain(
            clip,
            with_stored_moments(preconditioners[name], specs, moments, seed),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer that sees weights and gradients in float32, whatever they are stored in."""

    def update(grads: Params, state: optax.OptState, params: Params) -> tuple[Any, optax.OptState]:
        return optimizer.update(widened(grads), state, widened(params))

    return optax.GradientTransformation(lambda params: optimizer.init(widened(params)), update)  # type: ignore[arg-type]


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
        shapes = {name: list(param.shape) for name, param in params.items() if name in factored_axes}
        for name, shape in shapes.items():
            shape[factored_axes[name][which]] = 1
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


MUON_BATCH = 2**26
"""Most numbers that Muon orthogonalizes at a time; one matrix after another would take minutes to compile."""


class MuonState(NamedTuple):
    """The momentum of matrices, and Adam's state of all other parameters."""

    momentum: Params
    adam: optax.OptState


def scale_by_muon(specs: Specs, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon's preconditioner as `torch.optim.Muon` computes it with `match_rms_adamw`, for the kernels of linear layers.

    It makes the singular values of the momentum equal and gives the update the size that AdamW's usually have (arXiv
    2502.16982, equation 4), so a learning rate of AdamW serves. Convolutions, embeddings and vectors go to `adam`.
    """
    momentum, size = 0.95, 0.2
    matrices = {name for name, spec in specs.items() if spec.torch_axes == (1, 0)}

    def split(params: Params) -> tuple[Params, Params]:
        ours = {name: x for name, x in params.items() if name in matrices}
        return ours, {name: x for name, x in params.items() if name not in matrices}

    def init(params: Params) -> MuonState:
        ours, others = split(params)
        return MuonState(jax.tree.map(jnp.zeros_like, ours), adam.init(others))

    def update(grads: Params, state: MuonState, params: Params | None = None) -> tuple[Params, MuonState]:
        ours, others = split(grads)
        updates, adam_state = adam.update(others, state.adam)
        scaled: Params = dict(updates)  # type: ignore[call-overload]
        means = {name: momentum * state.momentum[name] + (1 - momentum) * grad for name, grad in ours.items()}
        ahead = {name: momentum * means[name] + (1 - momentum) * grad for name, grad in ours.items()}
        for names in equal_shapes(ahead, MUON_BATCH):
            stacked = orthogonalize(jnp.stack([ahead[name] for name in names]))
            scaled |= {name: size * max(x.shape) ** 0.5 * x for name, x in zip(names, stacked, strict=True)}
        return scaled, MuonState(means, adam_state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def equal_shapes(params: Params, most: int) -> list[list[str]]:
    """Return lists of names of parameters of one shape, each of at most `most` numbers or a single parameter."""
    of_shape: dict[tuple[int, ...], list[str]] = {}
    for name, x in params.items():
        of_shape.setdefault(x.shape, []).append(name)
    counts = {shape: max(1, most // math.prod(shape)) for shape in of_shape}
    return [
        names[start : start + counts[shape]]
        for shape, names in of_shape.items()
        for start in range(0, len(names), counts[shape])
    ]


def orthogonalize(x_NIO: jax.Array) -> jax.Array:
    """Return N matrices with the same singular vectors and singular values between about 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon); a matrix of zeros stays so.
    """
    x = x_NIO
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(1, 2), keepdims=True), 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class ProdigyState(NamedTuple):
    """AdamW's moments, of gradients times `distance`, and what the estimate of the distance follows from."""

    step: jax.Array
    """Number of all steps, for the schedule."""
    begun: jax.Array
    """Number of steps since the first one with a learning rate and a gradient."""
    distance: jax.Array
    """Estimate of the distance from the initial parameters to a solution: d in the paper."""
    numerator: jax.Array
    mean: Params
    square: Params
    total: Params
    """Weighted sum of the gradients: s in the paper."""
    start: Params
    """The initial parameters."""


def prodigy(
    learning_rate: optax.Schedule, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> optax.GradientTransformation:
    """Prodigy (arXiv 2306.06101, algorithm 4) as its authors' code computes it; the update has its sign and its rate.

    `optax.contrib.prodigy` divides 0 by 0 in a warmup from 0, gathers parameters that are split over devices, and its
    state shares the memory of the initial parameters, which a training step donates.
    """
    first, beta3 = 1e-6, beta2**0.5

    def init(params: Params) -> ProdigyState:
        zero, none = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        start = jax.tree.map(jnp.copy, params)
        return ProdigyState(zero, zero, jnp.asarray(first), jnp.zeros(()), none, none, none, start)

    def update(grads: Params, state: ProdigyState, params: Params) -> tuple[Params, ProdigyState]:
        begun, d = state.begun + 1, state.distance
        size = d * learning_rate(state.step) * (1 - beta2**begun) ** 0.5 / (1 - beta1**begun)
        weight = d / first * size
        slope = sum(jnp.sum(grad * (state.start[name] - params[name])) for name, grad in grads.items())
        mean = {name: beta1 * state.mean[name] + (1 - beta1) * d * grad for name, grad in grads.items()}
        square = {name: beta2 * state.square[name] + (1 - beta2) * (d * grad) ** 2 for name, grad in grads.items()}
        total = {name: beta3 * state.total[name] + weight * grad for name, grad in grads.items()}
        denominator = sum(jnp.sum(jnp.abs(x)) for x in total.values())
        numerator = beta3 * state.numerator + weight * slope
        distance = jnp.maximum(d, numerator / jnp.where(denominator > 0, denominator, 1))
        updates = {
            name: -size * (mean[name] / (jnp.sqrt(square[name]) + distance * epsilon) + weight_decay * param)
            for name, param in params.items()
        }
        new = ProdigyState(state.step, begun, distance, numerator, mean, square, total, state.start)
        kept = jax.tree.map(lambda new, old: jnp.where(denominator > 0, new, old), new, state)
        return updates, kept._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
