"""Makes a training state and batches of random numbers, to time the step without weights and data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from dpo_jax.batch import PreferenceBatch
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.moving_reference import first_reference
from dpo_jax.training.step import Frozen, TrainState
from dpo_jax.weights.quantised import Held, quantise


def random_state(experiment: Experiment) -> tuple[TrainState, Frozen]:
    """Return a training state and frozen weights; the reference is the policy, rounded as in training."""
    abstract = experiment.abstract_state()
    params = random_weights(abstract.params, seed=0)
    shapes, base, reference = experiment.frozen, {}, {}
    if shapes.base:  # a LoRA begins with its second factor at 0, and its reference is the base
        base = random_weights(shapes.base, seed=1)
        params = {name: x * 0 if "lora_B" in name else x for name, x in params.items()}
    else:
        reference = {name: jnp.array(params[name], shape.dtype) for name, shape in shapes.reference.items()}
    frozen = Frozen(base, reference, {name: random_weights(each, seed=1) for name, each in shapes.encoders.items()})
    place = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    opt_state = jax.jit(experiment.optimizer.init, out_shardings=place)(params)
    ema = {name: jnp.copy(params[name]) for name in abstract.ema}
    running = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.running)
    moving = first_reference(params) if abstract.reference else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, running, moving), frozen


def random_weights(shapes: Any, seed: int) -> Any:
    """Return kernels of variance 1 / fan-in, scales around 1 and biases around 0, up to 13 GB, made on the device.

    All are slices of one array of random numbers, since hundreds of generators would take minutes to compile.
    """
    sizes = [math.prod(shape.shape) for shape in shapes.values()]

    def make(key: jax.Array) -> Any:
        numbers = jax.random.normal(key, (max(sizes) + len(sizes),), jnp.float32)

        def weight(i: int, name: str, shape: Any) -> Held:
            deviation = math.prod(shape.shape[:-1]) ** -0.5 if len(shape.shape) > 1 else 0.1
            part = numbers[i : i + sizes[i]].reshape(shape.shape) * deviation
            weight = (part + name.endswith("scale")).astype(shape.dtype)
            return quantise(weight, shape.qtype) if isinstance(shape, QArray) else weight

        return {name: weight(i, name, shape) for i, (name, shape) in enumerate(shapes.items())}

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(jax.random.key(seed))


def random_batch(experiment: Experiment, seed: int) -> PreferenceBatch:
    """Return a batch of latents and embeddings if the config trains on them, otherwise of images and token ids."""
    rng = np.random.default_rng(seed)
    abstract = experiment.abstract_batch()

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        return rng.integers(0, 255, shape.shape).astype(shape.dtype)  # every vocabulary is larger

    size = experiment.config.data.resolution
    size_cond_6 = np.array([size, size, 0, 0, size, size], np.float32)
    ones = np.ones(abstract.preference_BK.shape)
    batch = abstract._replace(
        inputs=jax.tree.map(draw, abstract.inputs),
        size_cond_BK6=np.broadcast_to(size_cond_6, abstract.size_cond_BK6.shape),
        preference_BK=np.float32(ones * np.eye(1, ones.shape[1])),
        valid_BK=ones.astype(bool),
        weight_B=np.ones(len(ones), np.float32),
        index_B=np.arange(len(ones), dtype=np.int32) + seed * len(ones),
        cell_weight_BKhw=jax.tree.map(lambda shape: np.ones(shape.shape, shape.dtype), abstract.cell_weight_BKhw),
    )
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch, abstract)
