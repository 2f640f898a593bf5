"""Stochastic rounding gives a neighbour in bfloat16, and the value on average."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.training.rounding import draws, key_of, stochastic_round, store

DRAWS = 4000


def test_it_gives_one_of_two_neighbours_with_the_value_as_mean():
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], 200) * 10.0 ** rng.uniform(-30, 30, 200)).astype(np.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), DRAWS))
    rounded = np.asarray(jax.vmap(lambda key: stochastic_round(jnp.asarray(x), key))(keys).astype(jnp.float32))
    below = np.abs(x).view(np.uint32) >> 16 << 16
    low, high = np.sort([below.view(np.float32) * np.sign(x), (below + 2**16).view(np.float32) * np.sign(x)], axis=0)
    assert ((rounded == low) | (rounded == high)).all()
    share = (x.astype(float) - low) / (high - low)
    error = np.sqrt(share * (1 - share) / DRAWS)
    assert (np.abs((rounded == high).mean(0) - share) < 5 * error + 1e-4).all()


def test_what_bfloat16_has_is_not_moved():
    x = jnp.asarray([0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf, jnp.nan, 3.3895314e38], jnp.bfloat16)
    for seed in range(50):
        rounded = stochastic_round(x.astype(jnp.float32), key_of(jax.random.key(seed), "x"))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x.astype(jnp.float32))


def test_parameters_of_one_shape_are_rounded_by_draws_of_their_own():
    like = {name: jnp.zeros(100, jnp.bfloat16) for name in ("a", "b")} | {"c": jnp.zeros(100)}
    values = dict.fromkeys(like, jnp.full(100, 1.001))
    stored = store(values, like, jax.random.key(0))
    assert (stored["a"] != stored["b"]).any()
    np.testing.assert_array_equal(stored["c"], values["c"])
    alone = stochastic_round(values["a"], key_of(jax.random.key(0), "a"))
    np.testing.assert_array_equal(stored["a"], alone)


def test_draws_are_uniform_and_neighbours_independent():
    drawn = np.asarray(draws(key_of(jax.random.key(0), "x"), (512, 512)))
    shares = drawn.astype(float) / 2**32
    assert abs(shares.mean() - 0.5) < 5 * 0.29 / 512
    counts, _ = np.histogram(shares, 256, (0, 1))
    assert ((counts - 1024) ** 2 / 1024).sum() < 256 + 5 * np.sqrt(2 * 256)
    for moved in (np.roll(shares, 1, 0), np.roll(shares, 1, 1), np.roll(shares, (1, 1), (0, 1))):
        assert abs(np.corrcoef(shares.ravel(), moved.ravel())[0, 1]) < 5 / 512
    other = np.asarray(draws(key_of(jax.random.key(1), "x"), (512, 512))) / 2**32
    assert abs(np.corrcoef(shares.ravel(), other.ravel())[0, 1]) < 5 / 512
