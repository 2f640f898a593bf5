"""Online learning (D3PO, arXiv 2311.13231): sample a round, have it judged, train on it with the usual step, again.

Order of a start or a resume: as in `training/trainer.py`; the step that the checkpoint is of tells the round and how
much of its training is done. What the round has sampled already is on disk, and sampling goes on with what is missing:
by the weights that the round began with, which nothing has changed since.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.cli import replaced
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.methods import find_method
from dpo_jax.objectives.advantages import PromptStatistics
from dpo_jax.rewards import Judge
from dpo_jax.rewards.together import ask_together
from dpo_jax.rounds.config import RoundSizes, check, images_per_prompt, online_config, round_sizes
from dpo_jax.rounds.feedback import decided, learnable
from dpo_jax.rounds.folder import Rewards, RoundFolder
from dpo_jax.rounds.judges import find_latent_judge, latent_judge_fingerprints, open_judges
from dpo_jax.rounds.method import learned_steps, on_rounds, sampler_table
from dpo_jax.rounds.notes import Notes
from dpo_jax.rounds.prompt_text import EncodedPrompts, TextOf, text_of_prompts
from dpo_jax.rounds.rollout import Drawn, Rollout
from dpo_jax.rounds.updates import Updates
from dpo_jax.rounds.window import window_steps
from dpo_jax.sampling.prompts import read_prompts
from dpo_jax.training.experiment import build, compose
from dpo_jax.training.loggers import check_libraries
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import read_metrics
from dpo_jax.training.model import make_placement, open_model
from dpo_jax.training.needs import check_grids, check_room
from dpo_jax.training.preemption import Notice, Preempted
from dpo_jax.training.sample_grids import open_sample_judge
from dpo_jax.training.startup import StartupClock
from dpo_jax.training.step import TrainState
from dpo_jax.training.trainer import begin, check_backend, running

FIRST_FRESH = 2**30
"""Number of the first evaluation prompt, beyond the numbers of all rounds; its noise follows from the number."""
MOST_IDLE = 3
"""A run ends after this many rounds if none of them has taught anything."""


def learn(config: ConfigDict, workdir: epath.PathLike, stage: str = "", feedback: Sequence[str] = ()) -> None:
    """Run the rounds of `config`, continuing what the work directory holds.

    Args:
        config: a config made from `online_config`.
        workdir: folder of the run: a new one, or one to continue.
        stage: "sample" stops after sampling a round, "train" after training on it. "" runs round after round, as long
            as there are judges or feedback by people.
        feedback: files with people's scores of the round's images; by default those in the round's folder.

    Raises:
        Preempted: SIGTERM came. The state is saved, and the same call continues.
    """
    workdir, clock = epath.Path(workdir), StartupClock()
    check(config)
    check_backend(config)
    check_libraries(config.logging.to)
    prompts = [prompt.text for prompt in read_prompts(config.online.prompts)]
    if not config.online.judges and config.online.prompts_per_round > len(prompts):
        raise UserError(
            f"config.online.prompts_per_round={config.online.prompts_per_round}, but {config.online.prompts} has only "
            f"{len(prompts)} prompts, and people see no prompt twice in a round. Set prompts_per_round to "
            f"{len(prompts)} or less"
        )
    fresh = (
        [prompt.text for prompt in read_prompts(config.online.evaluation_prompts)]
        if config.online.evaluate_every
        else []
    )
    with Notice.awaited() as notice, cluster.locked(workdir, "python -m dpo_jax.online"):
        judges, watched = open_judges(config)
        sample_judge = open_sample_judge(config)
        pipeline = open_model(config, workdir)
        check_grids(config, pipeline)
        steps_S = learned_steps(config, sampler_table(config, pipeline))
        plan = round_sizes(config, steps_S, device_count=jax.device_count(), process_count=jax.process_count())
        config = replaced(config, {"steps": config.online.rounds * plan.updates})
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        fingerprints = latent_judge_fingerprints(find_latent_judge(config, pipeline), pipeline.variant)
        fields = begin(config, workdir, pipeline, online_config(), fingerprints | {"fingerprints.prompts": digest})
        composed = compose(config, plan.derived, pipeline, make_placement(config), on_rounds)
        check_room(config, workdir, composed.abstract_state())
        text_of = text_of_prompts(config, pipeline, composed.placement, [*prompts, *fresh])
        experiment = build(config, plan.derived, pipeline, on_rounds)
        if isinstance(text_of, EncodedPrompts):
            experiment = text_of.join(experiment)
        with running(experiment, workdir, fields, notice, clock, judge=sample_judge) as (loop, state, _):
            Rounds(loop, plan, prompts, text_of, judges, steps_S, feedback, fresh, watched).run(state, stage)


class Rounds:
    """Runs round after round.

    Process 0 looks for all processes what is on the disk already: the others may see it later.
    """

    def __init__(
        self,
        loop: Loop,
        plan: RoundSizes,
        prompts: Sequence[str],
        text_of: TextOf,
        judges: Sequence[Judge],
        steps_S: np.ndarray,
        feedback: Sequence[str],
        fresh: Sequence[str] = (),
        watched: Sequence[Judge] = (),
    ):
        self._fresh = fresh
        """Prompts to evaluate with."""
        self._loop, self._plan, self._prompts, self._judges = loop, plan, prompts, judges
        self._watched = watched
        """Judges that are never trained on."""
        self._steps_S, self._feedback = steps_S, [epath.Path(file) for file in feedback]
        self._config, self._workdir, self._say = loop.config, loop.workdir, loop.bar.say
        experiment = loop.experiment
        self._rollout = Rollout(self._config, experiment.pipeline, experiment.placement, text_of)
        self._text_of = text_of
        self._names = list(self._config.online.judges) or ["people"]
        remembers = find_method(self._config.loss.name).reads_advantages and self._config.online.advantage == "prompt"
        self._notes = Notes(loop, plan, self._feedback)
        self._kept = 0
        """The first round whose trajectories may still be there."""
        self._idle: int | None = 0
        """Number of rounds that have taught nothing; None once a round has taught something."""
        self._statistics_R = [PromptStatistics() for _ in self._names] if remembers else []

    def run(self, state: TrainState, stage: str) -> TrainState:
        """Run until the last round, the end of the stage, or until people are needed."""
        first = int(state.step) // self._plan.updates
        if self._judges and cluster.is_first():
            self._forget(first + 1)
        self._remove_trajectories(first - 1)  # a kill may have come before it
        if first >= MOST_IDLE:
            self._idle = None
        for folder in map(self.folder, range(first if self._statistics_R or first < MOST_IDLE else 0)):
            learned = learnable(self._config, self._shown(folder)[:, None], folder.prompts, self._statistics_R)
            self._count_idle(self._config.online.branching or bool(decided(self._config, *learned).any()))
        for number in range(first, self._config.online.rounds):
            self._evaluate(number, state)
            folder, step = self.folder(number), int(state.step)
            missing = self._missing(folder)
            if stage == "train" and missing:
                raise UserError(
                    f"round {number + 1} is not sampled yet: {folder.path}/trajectories lacks {len(missing)} of "
                    f"{len(folder.prompts)} files, such as {min(missing):05d}.npz. Run with --stage=sample first"
                )
            if step > number * self._plan.updates and missing:
                raise UserError(
                    f"step {step} is in the middle of round {number + 1}, but {folder.path} lacks some of its "
                    "trajectories. They cannot be sampled again, since the weights have changed. Restore them from a "
                    "backup, or start in another --workdir"
                )
            self._sample(folder, state, missing)
            people = cluster.is_first() and bool(self._feedback or folder.feedback() or folder.is_scored())
            is_judged = bool(self._judges) or bool(cluster.says_first(people))
            if stage == "train" and not is_judged:
                raise UserError(
                    f"round {number + 1} has no scores: {folder.path} has no feedback*.json. Vote on its images and "
                    "export the votes there (--stage=sample shows the commands), or name files with --feedback"
                )
            if stage == "sample" or not is_judged:
                self._ask(folder)
                return state
            rewards_PSKR, stops = self._judged(folder, step)
            if stops:
                return state
            learned = learnable(self._config, rewards_PSKR, folder.prompts, self._statistics_R)
            self._tell_undecided(number, decided(self._config, *learned))
            steps_S = window_steps(self._config, number) if self._config.online.window else self._steps_S
            updates = Updates(
                self._config, self._plan, folder, steps_S, self._text_of(folder.prompts), *learned, step=step
            )
            state = self._loop.run(state, updates, end=(number + 1) * self._plan.updates)
            self._remove_trajectories(number)
            if stage == "train":
                return state
        self._evaluate(self._config.online.rounds, state)
        if cluster.is_first():
            self._say(
                f"all {self._config.online.rounds} rounds are done. Scores of each: {self._workdir / 'result.json'}"
            )
        return state

    def _evaluate(self, number: int, state: TrainState) -> None:
        """Let the judges score images of the evaluation prompts, drawn by the policy that a round begins with.

        The noise is the same every time, so that only the policy differs. Each evaluation that is due is made once, and
        never in the middle of a round.
        """
        every, total = self._config.online.evaluate_every, self._config.online.rounds
        is_due = bool(every) and (number % every == 0 or number == total)
        if not is_due or int(state.step) != number * self._plan.updates:
            return
        noted = cluster.is_first() and any(row.get("evaluation/round") == number for row in read_metrics(self._workdir))
        if cluster.says_first(noted):
            return
        size, scores_R = self._rollout.batch_size, np.zeros(len(self._judges))
        for start in range(0, len(self._fresh), size):
            if jax.process_count() == 1 and self._loop.notice.received():
                raise Preempted(f"preempted before round {number + 1}; run the same command again to continue")
            captions = self._fresh[start : start + size]
            numbers = [FIRST_FRESH + start + i for i in range(len(captions))]
            drawn = self._rollout(state.params, self._loop.experiment.frozen, captions, numbers)()
            scores_R += self._scores(drawn.images_BKHWC, captions).mean(axis=1).sum(axis=0)
            self._loop.bar.note(
                f"evaluating before round {number + 1}: {start + len(captions)}/{len(self._fresh)} prompts"
            )
        means = dict(zip(self._names, (scores_R / len(self._fresh)).tolist(), strict=True))
        if cluster.is_first():
            scalars = {f"evaluation/{name}": mean for name, mean in means.items()}
            self._loop.writer.scalars(int(state.step), {"evaluation/round": number, **scalars})
            said = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
            self._say(f"after {number} rounds, mean scores on {len(self._fresh)} evaluation prompts: {said}")

    def folder(self, number: int) -> RoundFolder:
        """Return the folder of a round; its prompts depend on the seed and the number only."""
        count = self._config.online.prompts_per_round
        rng = np.random.default_rng([self._config.seed, number])
        chosen = rng.choice(len(self._prompts), count, replace=count > len(self._prompts))
        return RoundFolder(self._workdir, number, [self._prompts[i] for i in chosen])

    def _forget(self, number: int) -> None:
        """Remove the trajectories from this round on: no checkpoint holds the weights that sampled them.

        Weights that are trained again may differ from those by rounding.
        """
        later = map(self.folder, itertools.count(number))
        for folder in itertools.takewhile(lambda folder: folder.path.exists(), later):
            folder.remove_trajectories()

    def _missing(self, folder: RoundFolder) -> set[int]:
        """Return the prompts that are not sampled yet."""
        missing_P = np.zeros(len(folder.prompts), bool)
        if cluster.is_first():
            missing_P[folder.missing()] = True
        return set(np.flatnonzero(cluster.says_first(missing_P)).tolist())

    def _sample(self, folder: RoundFolder, state: TrainState, missing: set[int]) -> None:
        """Sample what is missing of the round, and let the judges score it if there are any.

        The batches are those of a round that is sampled from its start: others would round differently. A batch is
        judged and written while the devices sample the next one.
        """
        size, total = self._rollout.batch_size, len(folder.prompts)
        frozen = self._loop.experiment.frozen
        batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
        begun: tuple[range, Callable[[], Drawn]] | None = None
        for batch in [*(batch for batch in batches if missing.intersection(batch)), None]:
            if jax.process_count() == 1 and self._loop.notice.received():
                raise Preempted(f"preempted in round {folder.number + 1}; run the same command again to continue")
            last, begun = begun, None
            if batch is not None:
                numbers = [folder.number * total + p for p in batch]
                captions = [folder.prompts[p] for p in batch]
                begun = batch, self._rollout(state.drawing, frozen, captions, numbers, folder.number)
            if last is not None:
                missing = self._finish(folder, *last, missing)
        if cluster.is_first():
            folder.write_list(images_per_prompt(self._config))
        cluster.wait("sampled the round")

    def _finish(self, folder: RoundFolder, batch: range, drawn: Callable[[], Drawn], missing: set[int]) -> set[int]:
        """Let the judges score a batch and write what was missing of it; returns what is missing still."""
        first, total = folder.number * len(folder.prompts) + batch.start, len(folder.prompts)
        with cluster.watched(f"to sample prompt {first}"):
            sampled = drawn()
        rewards = self._judge(sampled, [folder.prompts[p] for p in batch])
        new = [(b, p) for b, p in enumerate(batch) if p in missing]
        for b, p in new if cluster.is_first() else []:
            folder.write_images(p, sampled.images_BKHWC[b])
        # A trajectory, whichever process wrote it, says that its images are there.
        with cluster.watched(f"to write the images of prompt {first}"):
            cluster.wait("wrote images")
        for b, p in new:
            if b in sampled.trajectories:
                folder.write_trajectory(p, sampled.trajectories[b], rewards[b] if rewards else None)
        missing = missing.difference(batch)
        self._loop.bar.note(f"sampling round {folder.number + 1}: {total - len(missing)}/{total} prompts")
        return missing

    def _judge(self, drawn: Drawn, captions: Sequence[str]) -> list[Rewards]:
        """Return the judges' rewards for each prompt's images; empty without judges."""
        if not self._judges:
            return []
        shown_BKR = self._scores(drawn.images_BKHWC, captions)
        found = [Rewards(shown_KR) for shown_KR in shown_BKR]
        if self._watched:
            watched_BKW = self._scores(drawn.images_BKHWC, captions, self._watched)
            found = [of_prompt._replace(watched_KW=w) for of_prompt, w in zip(found, watched_BKW, strict=True)]
        if drawn.seen_BSK is None:
            return found
        if self._config.online.latent_judge:
            return [
                of_prompt._replace(steps_SKR=s) for of_prompt, s in zip(found, drawn.seen_BSK[..., None], strict=True)
            ]
        return [
            of_prompt._replace(steps_SKR=self._scores(images_SKHWC, [caption] * len(images_SKHWC)))
            for of_prompt, images_SKHWC, caption in zip(found, drawn.seen_BSK, captions, strict=True)
        ]

    def _scores(
        self, images_BKHWC: np.ndarray, captions: Sequence[str], judges: Sequence[Judge] | None = None
    ) -> np.ndarray:
        """Return scores [B, K, R], by default of the judges that are trained on."""
        B, K = images_BKHWC.shape[:2]
        images, each = images_BKHWC.reshape(B * K, *images_BKHWC.shape[2:]), [c for c in captions for _ in range(K)]
        return np.moveaxis(ask_together(judges or self._judges, images, each), 0, -1).reshape(B, K, -1)

    def _ask(self, folder: RoundFolder) -> None:
        """Print what to do with a sampled round."""
        if not cluster.is_first():
            return
        self._say(f"round {folder.number + 1} is sampled; its images are in {folder.images}")
        if not self._judges:
            votes, file = folder.path / "votes.sqlite", folder.path / "feedback.json"
            mode = "--mode=points" if self._config.online.candidates > 1 else "--mode=tag --tags=bad"
            self._say(
                "Let people vote, then continue with --stage=train:\n"
                f"  python -m dpo_jax.vote --images={folder.images} {mode} --output={votes}\n"
                f"  python -m dpo_jax.vote --output={votes} --export={file}\n"
                f"Or write the scores, [prompt][candidate], to {file} yourself."
            )

    def _judged(self, folder: RoundFolder, step: int) -> tuple[np.ndarray, bool]:
        """Return rewards_PSKR of the round, and whether the run ends before training on it.

        The scores are stored once, and hold when the run is resumed.
        """
        online, steps = self._config.online, None
        if online.branching:
            steps = len(self._steps_S), online.candidates, 1 if online.latent_judge else len(self._names)
        watched = (images_per_prompt(self._config), len(self._watched)) if self._watched else None
        found = folder.read_rewards(self._shape_KR, steps, watched) if self._judges else []
        best, stops = -1, False
        with cluster.together(f"storing the scores of round {folder.number + 1}"):
            if cluster.is_first():
                best, stops = self._notes.note(folder, step, found)
        conclusion = cluster.says_first(np.array([best, stops]))
        self._loop.checkpoints.best.step = int(conclusion[0])
        of_steps = [rewards.steps_SKR for rewards in found if rewards.steps_SKR is not None]
        return np.stack(of_steps) if of_steps else self._shown(folder)[:, None], bool(conclusion[1])

    def _tell_undecided(self, number: int, decided_P: np.ndarray) -> None:
        """Print how many prompts of a round teach nothing; UserError if no prompt of `MOST_IDLE` rounds did."""
        undecided, total = int((~decided_P).sum()), len(decided_P)
        who = " and ".join(self._names)
        if 0 < undecided < total:
            self._say(f"round {number + 1}: {undecided} of {total} prompts have equal candidates according to {who}")
        if undecided == total:
            self._say(
                f"warning: round {number + 1}: all {total} prompts have equal candidates according to {who}; this "
                "round teaches nothing"
            )
        self._count_idle(undecided < total)
        if self._judges and self._idle == min(MOST_IDLE, self._config.online.rounds):
            first = "the first round" if self._idle == 1 else f"the first {self._idle} rounds"
            raise UserError(
                f"all candidates of {first} are equal according to {who}, so the model cannot learn. Correct "
                "config.online.judges, or raise online.candidates, and start in another --workdir"
            )

    def _count_idle(self, is_decided: bool) -> None:
        self._idle = None if is_decided or self._idle is None else self._idle + 1

    def _shown(self, folder: RoundFolder) -> np.ndarray:
        """[P, K, R], from `scores.json`."""
        shown_PKR = np.zeros((len(folder.prompts), *self._shape_KR))
        with cluster.together(f"reading the scores of round {folder.number + 1}"):
            if cluster.is_first():
                shown_PKR = _there(folder, folder.read_scores(self._shape_KR))
        return cluster.says_first(shown_PKR)

    @property
    def _shape_KR(self) -> tuple[int, int]:
        """Images of a prompt, and scores of each."""
        return images_per_prompt(self._config), len(self._names)

    def _remove_trajectories(self, last: int) -> None:
        """Remove the trajectories of rounds up to `last`, unless a checkpoint is in the middle of the round."""
        oldest = self._loop.checkpoints.oldest_to_resume() or 0
        while self._kept <= last and (self._kept + 1) * self._plan.updates <= oldest:
            if cluster.is_first():
                self.folder(self._kept).remove_trajectories()
            self._kept += 1


def _there(folder: RoundFolder, shown_PKR: np.ndarray | None) -> np.ndarray:
    """What `read_scores` found, which has to be there."""
    if shown_PKR is None:
        raise MissingFileError(
            f"{folder.path} has no scores.json, and later rounds build on it; put it back or begin another --workdir"
        )
    return shown_PKR
