"""Rounds of the embedded model: what is stored of an image is how it was made, and can be found again.

B prompts, K candidates, S random steps, h x w latent cells, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.cli import replaced
from dpo_jax.diffusion.guidance import classifier_free_guidance
from dpo_jax.diffusion.samplers import make_table
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.diffusion.steps import sample, starting_latents
from dpo_jax.diffusion.trajectories import branch
from dpo_jax.encode.images import decode_latents
from dpo_jax.encode.text import make_conditionings
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rounds import prompt_text
from dpo_jax.rounds.config import round_sizes
from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.rounds.method import learned_steps, on_rounds, sampler_table
from dpo_jax.rounds.prompt_text import text_of_prompts
from dpo_jax.rounds.rollout import Rollout
from dpo_jax.rounds.updates import Updates
from dpo_jax.rounds.window import window_steps
from dpo_jax.training.experiment import build, compose
from dpo_jax.training.model import load_tokenizers_of, open_model

CAPTIONS, NUMBERS = ["a red circle at the top left", "a blue square at the bottom right"], [5, 1_000_003]
B, K, S = 2, 3, 4
SIZE = np.array([[32, 32, 0, 0, 32, 32]], np.float32)


class LoadedModel:
    """An experiment and what sampling needs of it."""

    def __init__(self, config, workdir, **pipeline_fields):
        self.config = config
        self.pipeline = dataclasses.replace(open_model(config, workdir), **pipeline_fields)
        self.table = sampler_table(config, self.pipeline)
        self.steps_S = learned_steps(config, self.table)
        self.plan = round_sizes(config, self.steps_S, device_count=1, process_count=1)
        self.experiment = build(config, self.plan.derived, self.pipeline, on_rounds)
        self.params = self.experiment.initial_state().params
        self.tokenizers = load_tokenizers_of(self.pipeline)
        self.text_of = text_of_prompts(config, self.pipeline, self.experiment.placement, CAPTIONS)
        if config.online.encode_prompts:
            self.experiment = self.text_of.join(self.experiment)
        self.rollout = Rollout(config, self.pipeline, self.experiment.placement, self.text_of)

    def __call__(self, captions=CAPTIONS, numbers=NUMBERS):
        return self.rollout(self.params, self.experiment.frozen, captions, numbers)()

    @functools.cached_property
    def drawn(self):
        return self()

    def starts(self):
        """x_BhwC and each prompt's key for steps, as they follow from the seed and the numbers."""
        keys = [jax.random.fold_in(jax.random.key(self.config.seed), number) for number in NUMBERS]
        noises = [jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 4)) for key in keys]
        return starting_latents(self.table, jnp.stack(noises)), jnp.stack([jax.random.fold_in(k, 1) for k in keys])

    def decode(self, latents_NhwC):
        decode = jax.jit(lambda vae, x: decode_latents(self.pipeline.vae, vae, x)[0])
        return np.asarray(decode(self.experiment.frozen.encoders["vae"], latents_NhwC))

    def batches(self, folder):
        """Both prompts with all their steps, in one batch."""
        for b, trajectory in self.drawn.trajectories.items():
            folder.write_trajectory(b, trajectory, None)
        text = self.text_of(CAPTIONS)
        rewards = np.zeros((B, 1, K, 1))
        return next(Updates(self.config, self.plan, folder, self.steps_S, text, rewards, rewards[..., 0], step=0))


FIELDS = {
    "online.prompts_per_round": B,
    "online.prompts_at_a_time": B,
    "data.batch_size": B,
    "online.candidates": K,
    "online.sampling_steps": S,
    "online.timesteps": 1.0,
    "online.encode_prompts": False,
}


@pytest.fixture(scope="module")
def opened(online, tmp_path_factory):
    """`opened(**fields)`: an experiment, opened once."""

    @functools.cache
    def of(**fields):
        return LoadedModel(online(**FIELDS | fields), tmp_path_factory.mktemp("run"))

    return of


def test_candidates_begin_alike_and_each_step_leads_to_the_next(opened):
    drawn, (x_BhwC, _) = opened().drawn, opened().starts()
    assert sorted(drawn.trajectories) == [0, 1]
    assert drawn.images_BKHWC.shape == (B, K, 32, 32, 3)
    assert drawn.images_BKHWC.dtype == np.uint8
    assert drawn.seen_BSK is None
    for b, trajectory in drawn.trajectories.items():
        assert trajectory.x_SJhwC.shape == trajectory.next_x_SKhwC.shape == (S, K, 8, 8, 4)
        assert {array.dtype for array in trajectory[:3]} == {np.dtype(np.float32)}
        for k in range(K):
            np.testing.assert_allclose(trajectory.x_SJhwC[0, k], x_BhwC[b], atol=1e-6)
        np.testing.assert_array_equal(trajectory.x_SJhwC[1:], trajectory.next_x_SKhwC[:-1])
        parted = [np.abs(trajectory.next_x_SKhwC[0, k] - trajectory.next_x_SKhwC[0, k - 1]).mean() for k in range(K)]
        assert min(parted) > 0.1


def test_images_that_are_not_finite_are_an_error(opened):
    o = opened()
    name = next(iter(o.params))
    broken = o.params | {name: jnp.full_like(o.params[name], jnp.nan)}
    with pytest.raises(
        ValueError, match="images of 2 prompts, the first 'a red circle at the top left', came out black"
    ):
        o.rollout(broken, o.experiment.frozen, CAPTIONS, NUMBERS)()


def test_images_are_those_of_the_sampler_and_of_the_last_latents(opened):
    """Sampled again without a trajectory, guided, from the captions."""
    o = opened()
    conditionings = make_conditionings(o.pipeline, load_tokenizers_of(o.pipeline)([""]), o.config.online.guidance)

    @jax.jit
    def again(params, encoders, token_ids, x_BhwC, keys_B):
        sizes = jnp.tile(SIZE, (B * K, 1))
        both = conditionings(encoders, jnp.repeat(token_ids, K, axis=0), sizes)
        denoise = classifier_free_guidance(
            lambda x, t, c: o.pipeline.denoise(params, x, t, c), *both, o.config.online.guidance
        )
        return sample(denoise, o.table, *branch(x_BhwC, keys_B, K))

    token_ids = load_tokenizers_of(o.pipeline)(CAPTIONS)
    latents_NhwC = again(o.params, o.experiment.frozen.encoders, token_ids, *o.starts())
    last_NhwC = np.concatenate([o.drawn.trajectories[b].next_x_SKhwC[-1] for b in range(B)])

    np.testing.assert_allclose(last_NhwC, latents_NhwC, atol=1e-3)
    images_NHWC = o.drawn.images_BKHWC.reshape(B * K, 32, 32, 3).astype(int)
    for latents in (last_NhwC, latents_NhwC):
        assert np.abs(o.decode(latents) - images_NHWC).max() <= 1
    assert np.abs(images_NHWC[1:] - images_NHWC[:-1]).mean(axis=(1, 2, 3)).min() > 3, "no two images are alike"


def test_training_may_be_without_guidance(opened, tmp_path):
    """Its log-probabilities are those that a scale of 1 gives, of the same transitions of guided sampling."""
    o = opened()
    batch = o.batches(RoundFolder(tmp_path, 0, CAPTIONS))

    def log_probs(**fields):
        score = on_rounds(replaced(o.config, fields), o.pipeline, o.experiment.placement, o.experiment.objective)
        return np.asarray(jax.jit(score)(o.params, o.experiment.frozen, batch, jnp.int32(0)).log_prob_BK)

    unguided = log_probs(**{"online.train_guided": False})
    np.testing.assert_array_equal(unguided, log_probs(**{"online.guidance": 1.0}))
    assert np.abs(unguided - batch.inputs.transitions.log_prob_BK).max() > 1e-2


def test_what_becomes_of_a_prompt_does_not_depend_on_its_place(opened):
    o = opened()
    swapped, alone = o(CAPTIONS[::-1], NUMBERS[::-1]), o(CAPTIONS[1:], NUMBERS[1:])
    assert list(alone.trajectories) == [0]
    assert alone.images_BKHWC.shape == (1, K, 32, 32, 3)
    for place, other in ((1, swapped.trajectories[0]), (0, swapped.trajectories[1]), (1, alone.trajectories[0])):
        for found, expected in zip(other[:3], o.drawn.trajectories[place][:3], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    images = swapped.images_BKHWC[0].astype(int), alone.images_BKHWC[0].astype(int)
    for found in images:
        assert np.abs(found - o.drawn.images_BKHWC[1]).max() <= 1
    (other,) = o(CAPTIONS[1:], [6]).trajectories.values()
    assert np.abs(other.x_SJhwC[0] - o.drawn.trajectories[1].x_SJhwC[0]).mean() > 0.5


def largest_log_ratio(o, tmp_path, rows_at_a_time=B):
    """Recomputed by the policy that sampled; of B rows, as in sampling, or of all timesteps in one batch."""
    batch = o.batches(RoundFolder(tmp_path, 0, CAPTIONS))
    score = jax.jit(lambda params, frozen, batch: o.experiment.compare(params, frozen, batch, jnp.int32(0)))
    largest = 0.0
    for rows in np.arange(len(batch.weight_B)).reshape(B, -1).T.reshape(-1, rows_at_a_time):
        scores = score(o.params, o.experiment.frozen, jax.tree.map(lambda x, rows=rows: x[rows], batch))
        assert scores.log_prob_BK.shape == (rows_at_a_time, K)
        assert scores.log_prob_BK.dtype == jnp.float32
        largest = max(largest, np.abs(scores.log_prob_BK - scores.old_log_prob_BK).max())
        if scores.old_kl_BK is not None:
            largest = max(largest, scores.old_kl_BK.max(), np.abs(scores.standard_log_ratio_BK).max())
    return largest


def test_the_score_finds_the_log_probabilities_of_sampling_again(opened, tmp_path):
    assert largest_log_ratio(opened(), tmp_path) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_of_another_shape_and_bfloat16_find_them_to_rounding(opened, tmp_path, dtype):
    """In bfloat16 1.2e-7 at the batch of sampling and up to 3.6e-4 at four times that were seen on CPUs."""
    o = opened(dtype=dtype, vae_dtype=dtype)
    assert largest_log_ratio(o, tmp_path) <= 1e-6
    assert largest_log_ratio(o, tmp_path, B * S) <= (2e-6 if dtype == "float32" else 1e-3)


def quick(self, unet, x_NHWC, t_N, conditioning, dropout_keys_N=None):
    """In place of the network: something that depends on x, t and the caption, and compiles in no time."""
    shift_N = 1e-4 * t_N + 0.1 * conditioning.context_NLD.mean(axis=(1, 2))
    return 0.9 * x_NHWC + shift_N[:, None, None, None]


@pytest.mark.parametrize(
    ("family", "method", "sampler"),
    # Three text encoders, and a model that is told the guidance scale instead of being guided.
    [("sd3", "flow_grpo", "flow_sde"), ("flux", "d3po", "flow_cps")],
)
def test_flow_models_are_sampled_with_noise_and_all_steps_but_the_last_are_trained_on(
    online, tmp_path, monkeypatch, family, method, sampler
):
    monkeypatch.setattr(Pipeline, "denoise", quick)
    fields = {"model": f"random:{family}", "loss.name": method, "online.sampler": sampler, "data.text_length": 20}
    if method == "flow_grpo":
        fields["loss.ratio"] = "guard"
    o = LoadedModel(online(**FIELDS | fields), tmp_path)

    np.testing.assert_array_equal(o.steps_S, np.arange(S - 1))
    assert (o.table.steps.d[-1] > 0) == (sampler == "flow_sde")
    for trajectory in o.drawn.trajectories.values():
        assert trajectory.x_SJhwC.shape == (S - 1, K, 8, 8, 16)
        assert not np.array_equal(trajectory.next_x_SKhwC[0, 0], trajectory.next_x_SKhwC[0, 1])
        assert (trajectory.mean_SJhwC is None) == (method == "d3po")
    assert largest_log_ratio(o, tmp_path) <= 1e-6


def test_prompts_are_encoded_once_and_drawn_alike(online, tmp_path, monkeypatch):
    """Of a model that attends to no padding; with guidance, whose empty caption is encoded, too."""
    monkeypatch.setattr(Pipeline, "denoise", quick)
    fields = {"model": "random:z_image", "online.sampler": "flow_cps", "data.text_length": 40}
    by_tokens, encoded = (
        LoadedModel(online(**FIELDS | fields | {"online.encode_prompts": once}), tmp_path) for once in (False, True)
    )
    assert list(encoded.experiment.frozen.encoders) == ["vae"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), encoded.experiment.frozen.negative_text) == (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract_of(encoded).negative_text)
    )
    for b, trajectory in by_tokens.drawn.trajectories.items():
        for one, other in zip(trajectory[:3], encoded.drawn.trajectories[b][:3], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.allclose(*(encoded.drawn.trajectories[b].log_prob_SK for b in range(B)), atol=1e-3)
    assert largest_log_ratio(encoded, tmp_path) <= 1e-6
    with pytest.raises(KeyError):
        encoded.text_of(["another prompt"])


def abstract_of(o):
    return compose(o.config, o.plan.derived, o.pipeline, o.experiment.placement, on_rounds).frozen


def test_prompts_too_many_for_the_memory_are_a_mistake_of_the_user(opened, monkeypatch):
    o = opened()
    config = replaced(o.config, {"online.encode_prompts": True})
    monkeypatch.setattr(prompt_text, "MOST_OF_HOST", 0.0)
    with pytest.raises(UserError, match=r"keeps the features of 3 prompts, .* Name fewer prompts, or set it to False"):
        text_of_prompts(config, o.pipeline, o.experiment.placement, CAPTIONS)


def test_only_the_steps_of_a_round_s_window_add_noise(online, tmp_path, monkeypatch):
    """And one program draws all rounds, wherever their window is."""
    monkeypatch.setattr(Pipeline, "denoise", quick)
    fields = {"loss.name": "flow_grpo", "online.window": 1, "online.guidance": 1.0, "model": "random:sd3"}
    o = LoadedModel(online(**FIELDS | fields), tmp_path)
    assert (len(o.steps_S), o.plan.timesteps) == (1, 1)
    numbers = {window_steps(o.config, number).item(): number for number in range(20)}
    assert sorted(numbers) == [0, 1]  # the first half of 4 steps
    euler = make_table("flow_euler", o.pipeline.sampling_schedule, S).steps
    conditioning = make_conditionings(o.pipeline, o.tokenizers([""]), 1.0)(
        o.experiment.frozen.encoders, o.tokenizers(CAPTIONS), jnp.zeros((B, 6))
    )[0]
    each = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), conditioning)

    def by_euler(latents_NhwC, steps):
        for s in steps:
            velocity = quick(None, None, latents_NhwC, jnp.full(B * K, euler.t[s]), each)
            latents_NhwC = euler.a[s] * latents_NhwC + euler.b[s] * (latents_NhwC - euler.noise[s] * velocity)
        return latents_NhwC

    keys = [jax.random.fold_in(jax.random.key(o.config.seed), number) for number in NUMBERS]
    noises = jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 16)) for key in keys])
    start_NhwC = jnp.repeat(noises, K, axis=0)
    for first, number in numbers.items():
        drawn = o.rollout(o.params, o.experiment.frozen, CAPTIONS, NUMBERS, number)()
        x_NhwC, next_x_NhwC = (
            np.concatenate([getattr(drawn.trajectories[b], name)[0] for b in range(B)])
            for name in ("x_SJhwC", "next_x_SKhwC")
        )
        np.testing.assert_allclose(x_NhwC, by_euler(start_NhwC, range(first)), atol=1e-5)
        deviation = (next_x_NhwC[0] - next_x_NhwC[1]).std() / np.sqrt(2)
        np.testing.assert_allclose(deviation, o.table.steps.d[first], rtol=0.1)
        images = o.decode(by_euler(next_x_NhwC, range(first + 1, S)))
        assert np.abs(images.astype(int) - drawn.images_BKHWC.reshape(images.shape).astype(int)).max() <= 1
    without = o.rollout(o.params, o.experiment.frozen, CAPTIONS, NUMBERS)()
    assert np.abs(np.diff(without.images_BKHWC.astype(int), axis=1)).max() <= 1
    assert o.rollout._rollout._cache_size() == 1

    o.steps_S = window_steps(o.config, number)
    o.__dict__["drawn"] = drawn  # of that round
    assert largest_log_ratio(o, tmp_path) <= 1e-6


def test_a_last_step_without_noise_makes_the_image_and_is_not_trained_on(online, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "denoise", quick)
    fields = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    to_one = make_schedule(fields | {"num_train_timesteps": 1000, "set_alpha_to_one": True})
    o = LoadedModel(online("d3po:tiny", **FIELDS | {"online.timesteps": 1.0}), tmp_path, sampling_schedule=to_one)

    np.testing.assert_array_equal(o.steps_S, np.arange(S - 1))
    assert o.plan.timesteps == S - 1
    batch = o.batches(RoundFolder(tmp_path, 0, CAPTIONS))
    assert len(batch.weight_B) == B * (S - 1)
    np.testing.assert_array_equal(batch.inputs.transitions.step_B, [0, 1, 2] * B)
    for b, trajectory in o.drawn.trajectories.items():
        assert trajectory.next_x_SKhwC.shape == (S - 1, K, 8, 8, 4)
        last = jnp.asarray(trajectory.next_x_SKhwC[-1])
        step = jax.tree.map(lambda values_S: values_S[-1], o.table.steps)
        caption = o.tokenizers([CAPTIONS[b], ""])
        both = make_conditionings(o.pipeline, caption[1:], 5.0)(
            o.experiment.frozen.encoders, caption[:1], jnp.zeros((1, 6))
        )
        t_K = jnp.full(K, step.t)
        conditional, unconditional = (quick(o.pipeline, {}, last, t_K, c) for c in both)
        prediction = unconditional + o.config.online.guidance * (conditional - unconditional)
        x0 = step.a * last + step.b * (step.p * last + step.q * prediction)
        assert np.abs(o.decode(x0) - o.drawn.images_BKHWC[b].astype(int)).max() <= 1
        assert np.abs(o.decode(last) - o.drawn.images_BKHWC[b].astype(int)).max() > 1


def test_branching_shows_what_each_candidate_is_about_to_become(opened):
    o = opened(**{"online.branching": True})
    drawn, (x_BhwC, _) = o.drawn, o.starts()
    assert drawn.images_BKHWC.shape == (B, 1, 32, 32, 3)
    assert drawn.seen_BSK.shape == (B, S, K, 32, 32, 3)
    chosen = np.zeros((B, S), int)
    for b, trajectory in drawn.trajectories.items():
        assert trajectory.x_SJhwC.shape == (S, 1, 8, 8, 4)
        assert trajectory.next_x_SKhwC.shape == (S, K, 8, 8, 4)
        np.testing.assert_allclose(trajectory.x_SJhwC[0, 0], x_BhwC[b], atol=1e-6)
        for s in range(S - 1):  # one of the candidates goes on
            (chosen[b, s],) = [
                k for k in range(K) if np.array_equal(trajectory.next_x_SKhwC[s, k], trajectory.x_SJhwC[s + 1, 0])
            ]
    # After the last step the candidates are the images themselves.
    last_NhwC = np.concatenate([trajectory.next_x_SKhwC[-1] for trajectory in drawn.trajectories.values()])
    images_BKHWC = o.decode(last_NhwC).reshape(B, K, 32, 32, 3).astype(int)
    assert np.abs(images_BKHWC - drawn.seen_BSK[:, -1]).max() <= 1
    for b in range(B):
        assert min(np.abs(images_BKHWC[b, k] - drawn.images_BKHWC[b, 0]).max() for k in range(K)) <= 1
    conditionings = make_conditionings(o.pipeline, o.tokenizers([""]), o.config.online.guidance)

    @jax.jit
    def predicted(params, encoders, x_NhwC, t):
        both = conditionings(
            encoders, jnp.asarray(np.repeat(o.tokenizers(CAPTIONS), K, axis=0)), jnp.tile(SIZE, (B * K, 1))
        )
        denoise = classifier_free_guidance(
            lambda x, t, c: o.pipeline.denoise(params, x, t, c), *both, o.config.online.guidance
        )
        return denoise(x_NhwC, jnp.full(B * K, t))

    for s in range(S - 1):
        x_NhwC = np.concatenate([trajectory.next_x_SKhwC[s] for trajectory in drawn.trajectories.values()])
        after = jax.tree.map(lambda values_S, s=s: values_S[s + 1], o.table.steps)
        prediction = predicted(o.params, o.experiment.frozen.encoders, x_NhwC, jnp.float32(after.t))
        seen = o.decode(after.p * x_NhwC + after.q * prediction).reshape(B, K, 32, 32, 3).astype(int)
        assert np.abs(seen - drawn.seen_BSK[:, s]).max() <= 1


def test_of_branching_too_the_score_finds_the_log_probabilities_again(opened, tmp_path):
    assert largest_log_ratio(opened(**{"online.branching": True}), tmp_path) <= 1e-6
