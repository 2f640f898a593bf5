"""Online learning (D3PO, arXiv 2311.13231): sample a round, have it judged, train on it with the usual step, again.

Order of a start or a resume: as in `training/trainer.py`; the step that the checkpoint is of tells the round and how
much of its training is done. What the round has sampled already is on disk, and sampling goes on with what is missing:
by the weights that the round began with, which nothing has changed since.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.cli import replaced
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.objectives.advantages import PromptStatistics
from dpo_jax.rewards import Judge
from dpo_jax.rounds.config import RoundSizes, check, online_config, round_sizes
from dpo_jax.rounds.feedback import decided, learnable, read_feedback
from dpo_jax.rounds.folder import Rewards, RoundFolder
from dpo_jax.rounds.judges import find_latent_judge, latent_judge_fingerprints, open_judges
from dpo_jax.rounds.method import learned_steps, on_trajectories, sampler_table
from dpo_jax.rounds.result import Result
from dpo_jax.rounds.rollout import Drawn, Rollout
from dpo_jax.rounds.updates import Updates
from dpo_jax.sampling.prompts import read_prompts
from dpo_jax.training.experiment import build, compose
from dpo_jax.training.loggers import check_libraries
from dpo_jax.training.metrics import read_metrics
from dpo_jax.training.model import load_tokenizers_of, make_placement, open_model
from dpo_jax.training.needs import check_grids, check_room
from dpo_jax.training.preemption import Notice, Preempted
from dpo_jax.training.startup import StartupClock
from dpo_jax.training.step import TrainState
from dpo_jax.training.trainer import Loop, begin, check_backend, running

FIRST_FRESH = 2**30
"""The number of the first prompt to evaluate by, beyond those of all rounds: noises follow from it."""
MOST_IDLE = 3
"""A run ends when nothing was learned from so many rounds, and from none before."""


def learn(config: ConfigDict, workdir: epath.PathLike, stage: str = "", feedback: Sequence[str] = ()) -> None:
    """Runs the rounds of `config`, continuing what the work directory holds.

    Args:
        config: as `online_config` describes it.
        workdir: receives, or already holds, the run.
        stage: "sample" ends when the round is sampled, "train" when it is trained on. Without it rounds follow each
            other, as long as there is a judge or people's feedback for them.
        feedback: files in which people scored the round's images; by default those in the round's folder.

    Raises:
        Preempted: SIGTERM came; what is done is saved, and the same call continues.
    """
    workdir, clock = epath.Path(workdir), StartupClock()
    check(config)
    check_backend(config)
    check_libraries(config.logging.to)
    prompts = [prompt.text for prompt in read_prompts(config.online.prompts)]
    if not config.online.judges and config.online.prompts_per_round > len(prompts):
        raise UserError(
            f"config.online.prompts_per_round={config.online.prompts_per_round}, but {config.online.prompts} has "
            f"{len(prompts)} prompts, and people are shown none twice; take fewer"
        )
    fresh = (
        [prompt.text for prompt in read_prompts(config.online.evaluation_prompts)]
        if config.online.evaluate_every
        else []
    )
    with Notice.awaited() as notice, cluster.locked(workdir, "python -m dpo_jax.online"):
        judges = open_judges(config)
        pipeline = open_model(config, workdir)
        check_grids(config, pipeline)
        steps_S = learned_steps(config, sampler_table(config, pipeline))
        plan = round_sizes(config, steps_S, device_count=jax.device_count(), process_count=jax.process_count())
        config = replaced(config, {"steps": config.online.rounds * plan.updates})
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        fingerprints = latent_judge_fingerprints(find_latent_judge(config, pipeline), pipeline.variant)
        fields = begin(config, workdir, pipeline, online_config(), fingerprints | {"fingerprints.prompts": digest})
        composed = compose(config, plan.derived, pipeline, make_placement(config), on_trajectories)
        check_room(config, workdir, composed.abstract_state())
        experiment = build(config, plan.derived, pipeline, on_trajectories)
        with running(experiment, workdir, fields, notice, clock) as (loop, state, _):
            Rounds(loop, plan, prompts, judges, steps_S, feedback, fresh).run(state, stage)


class Rounds:
    """Round after round.

    What is on disk already is looked up by the first process, for all: others may see it later.
    """

    def __init__(
        self,
        loop: Loop,
        plan: RoundSizes,
        prompts: Sequence[str],
        judges: Sequence[Judge],
        steps_S: np.ndarray,
        feedback: Sequence[str],
        fresh: Sequence[str] = (),
    ):
        self._fresh = fresh
        """The prompts to evaluate by."""
        self._loop, self._plan, self._prompts, self._judges = loop, plan, prompts, judges
        self._steps_S, self._feedback = steps_S, [epath.Path(file) for file in feedback]
        self._config, self._workdir, self._say = loop.config, loop.workdir, loop.bar.say
        experiment = loop.experiment
        self._rollout = Rollout(self._config, experiment.pipeline, experiment.placement)
        self._tokenizers = load_tokenizers_of(experiment.pipeline)
        self._names = list(self._config.online.judges) or ["people"]
        remembers = self._config.loss.name != "d3po" and self._config.online.advantage == "prompt"
        self._result = Result(self._workdir, self._config, plan)
        self._kept = 0
        """The first round whose trajectories may still be there."""
        self._idle: int | None = 0
        """Rounds of which nothing was learned; None once there was one of which something was."""
        self._statistics_R = [PromptStatistics() for _ in self._names] if remembers else []

    def run(self, state: TrainState, stage: str) -> TrainState:
        """Until the last round, the end of the stage, or until people are needed."""
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
                raise UserError(f"round {number} is not sampled yet; run with --stage=sample first")
            if step > number * self._plan.updates and missing:
                raise UserError(
                    f"step {step} is in the middle of round {number}, but trajectories of it are missing in "
                    f"{folder.path}, and the weights that they were sampled with have changed; put them back or begin "
                    "another --workdir"
                )
            self._sample(folder, state, missing)
            people = cluster.is_first() and bool(self._feedback or folder.feedback() or folder.is_scored())
            is_judged = bool(self._judges) or bool(cluster.says_first(people))
            if stage == "train" and not is_judged:
                raise UserError(
                    f"nobody has scored round {number}: {folder.path} has no feedback*.json; vote on it and export the "
                    "votes there (run with --stage=sample to see how), or name files with --feedback"
                )
            if stage == "sample" or not is_judged:
                self._ask(folder)
                return state
            rewards_PSKR = self._judged(folder, step)
            learned = learnable(self._config, rewards_PSKR, folder.prompts, self._statistics_R)
            self._tell_undecided(number, decided(self._config, *learned))
            token_ids_PEL = self._tokenizers(folder.prompts)
            updates = Updates(self._config, self._plan, folder, self._steps_S, token_ids_PEL, *learned, step=step)
            state = self._loop.run(state, updates, end=(number + 1) * self._plan.updates)
            self._remove_trajectories(number)
            if stage == "train":
                return state
        self._evaluate(self._config.online.rounds, state)
        if cluster.is_first():
            self._say(f"all {self._config.online.rounds} rounds are done; figures: {self._workdir / 'result.json'}")
        return state

    def _evaluate(self, number: int, state: TrainState) -> None:
        """Has the judges score images of prompts that are not trained on, by the policy that a round begins with.

        The noises are the same every time, so that only the policy differs. It is done when the round is due, or the
        last one was, and once: what has been noted, or would come in the middle of a round, is left out.
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
                raise Preempted(f"preempted before round {number}; run the same command again to go on from there")
            captions = self._fresh[start : start + size]
            numbers = [FIRST_FRESH + start + i for i in range(len(captions))]
            drawn = self._rollout(state.params, self._loop.experiment.frozen, captions, numbers)
            scores_R += self._scores(drawn.images_BKHWC, captions).mean(axis=1).sum(axis=0)
            self._loop.bar.note(f"evaluating before round {number}: {start + len(captions)}/{len(self._fresh)} prompts")
        means = dict(zip(self._names, (scores_R / len(self._fresh)).tolist(), strict=True))
        if cluster.is_first():
            scalars = {f"evaluation/{name}": mean for name, mean in means.items()}
            self._loop.writer.scalars(int(state.step), {"evaluation/round": number, **scalars})
            said = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
            self._say(f"after {number} rounds, {len(self._fresh)} prompts that are not trained on: {said}")

    def folder(self, number: int) -> RoundFolder:
        """Of a round; its prompts are drawn by the seed and its number alone."""
        count = self._config.online.prompts_per_round
        rng = np.random.default_rng([self._config.seed, number])
        chosen = rng.choice(len(self._prompts), count, replace=count > len(self._prompts))
        return RoundFolder(self._workdir, number, [self._prompts[i] for i in chosen])

    def _forget(self, number: int) -> None:
        """The trajectories from this round on: the weights that sampled them are in no checkpoint any more.

        Those that are trained again may differ from them by rounding.
        """
        later = map(self.folder, itertools.count(number))
        for folder in itertools.takewhile(lambda folder: folder.path.exists(), later):
            folder.remove_trajectories()

    def _missing(self, folder: RoundFolder) -> set[int]:
        """The prompts that are not sampled yet."""
        missing_P = np.zeros(len(folder.prompts), bool)
        if cluster.is_first():
            missing_P[folder.missing()] = True
        return set(np.flatnonzero(cluster.says_first(missing_P)).tolist())

    def _sample(self, folder: RoundFolder, state: TrainState, missing: set[int]) -> None:
        """Samples what is missing of the round, and has it judged if there are judges.

        In the batches of a round of which nothing is there yet: in others, numbers would be rounded differently.
        """
        size, total = self._rollout.batch_size, len(folder.prompts)
        frozen = self._loop.experiment.frozen
        batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
        for i, batch in enumerate(batch for batch in batches if missing.intersection(batch)):
            if jax.process_count() == 1 and self._loop.notice.received():
                raise Preempted(f"preempted in round {folder.number}; run the same command again to go on from there")
            numbers = [folder.number * total + p for p in batch]
            captions = [folder.prompts[p] for p in batch]
            with cluster.watched(f"to sample prompt {numbers[0]}") if i else contextlib.nullcontext():
                drawn = self._rollout(state.params, frozen, captions, numbers)
            rewards = self._judge(drawn, captions)
            new = [(b, p) for b, p in enumerate(batch) if p in missing]
            for b, p in new if cluster.is_first() else []:
                folder.write_images(p, drawn.images_BKHWC[b])
            # A trajectory, of whatever process, says that its images are there.
            with cluster.watched(f"to write the images of prompt {numbers[0]}"):
                cluster.wait("wrote images")
            for b, p in new:
                if b in drawn.trajectories:
                    folder.write_trajectory(p, drawn.trajectories[b], rewards[b] if rewards else None)
            missing = missing.difference(batch)
            self._loop.bar.note(f"sampling round {folder.number}: {total - len(missing)}/{total} prompts")
        if cluster.is_first():
            folder.write_list(1 if self._config.online.branching else self._config.online.candidates)
        cluster.wait("sampled the round")

    def _judge(self, drawn: Drawn, captions: Sequence[str]) -> list[Rewards]:
        """What the judges say of each prompt's images; empty without judges."""
        if not self._judges:
            return []
        shown_BKR = self._scores(drawn.images_BKHWC, captions)
        if drawn.seen_BSK is None:
            return [Rewards(shown_KR) for shown_KR in shown_BKR]
        if self._config.online.latent_judge:
            return [Rewards(*of_prompt) for of_prompt in zip(shown_BKR, drawn.seen_BSK[..., None], strict=True)]
        return [
            Rewards(shown_KR, self._scores(images_SKHWC, [caption] * len(images_SKHWC)))
            for shown_KR, images_SKHWC, caption in zip(shown_BKR, drawn.seen_BSK, captions, strict=True)
        ]

    def _scores(self, images_BKHWC: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """[B, K, R]; those of the first process, since an outside judge may not say the same twice, nor for nothing."""
        B, K = images_BKHWC.shape[:2]
        images, each = images_BKHWC.reshape(B * K, *images_BKHWC.shape[2:]), [c for c in captions for _ in range(K)]
        scores_RN = np.zeros((len(self._judges), B * K), np.float32)

        def ask(*, is_outside: bool) -> None:
            for r, judge in enumerate(self._judges):
                if judge.is_outside == is_outside:
                    scores_RN[r] = judge.score(images, each)

        with cluster.together("asking its judges"):
            if cluster.is_first():
                ask(is_outside=True)
        ask(is_outside=False)  # networks may lie on the devices of all processes
        return np.moveaxis(cluster.says_first(scores_RN), 0, -1).reshape(B, K, -1)

    def _ask(self, folder: RoundFolder) -> None:
        """Says what is to be done with a sampled round."""
        if not cluster.is_first():
            return
        self._say(f"round {folder.number} is sampled: {folder.images}")
        if not self._judges:
            votes, file = folder.path / "votes.sqlite", folder.path / "feedback.json"
            mode = "--mode=points" if self._config.online.candidates > 1 else "--mode=tag --tags=bad"
            self._say(
                "ask people, then go on with --stage=train:\n"
                f"  python -m dpo_jax.vote --images={folder.images} {mode} --output={votes}\n"
                f"  python -m dpo_jax.vote --output={votes} --export={file}\n"
                f"or write their scores, [prompt][candidate], into {file} yourself"
            )

    def _judged(self, folder: RoundFolder, step: int) -> np.ndarray:
        """rewards_PSKR of the round; what is said of its images is noted once, and holds when the run is resumed."""
        online, steps = self._config.online, None
        if online.branching:
            steps = len(self._steps_S), online.candidates, 1 if online.latent_judge else len(self._names)
        found = folder.read_rewards(self._shape_KR, steps) if self._judges else []
        with cluster.together(f"noting what was said of round {folder.number}"):
            if cluster.is_first():
                self._note(folder, step, found)
        of_steps = [rewards.steps_SKR for rewards in found if rewards.steps_SKR is not None]
        return np.stack(of_steps) if of_steps else self._shown(folder)[:, None]

    def _note(self, folder: RoundFolder, step: int, found: Sequence[Rewards]) -> None:
        """Into the round's folder, the metrics and `result.json`; what a kill has kept from some of them as well."""
        start = folder.number * self._plan.updates
        noted_PKR = folder.read_scores(self._shape_KR)
        # Of judges what is beside the trajectories counts: the rounds may have been begun anew.
        shown_PKR = self._said(folder, found) if noted_PKR is None or self._judges or self._feedback else noted_PKR
        is_new = noted_PKR is None or not np.array_equal(shown_PKR, noted_PKR, equal_nan=True)
        if is_new and noted_PKR is not None and step > start and self._feedback:
            raise UserError(
                f"--feedback differs from {folder.path / 'scores.json'}, by which round {folder.number} is trained on "
                f"up to step {step} already; leave out --feedback to go on by that, or begin another --workdir"
            )
        if is_new:
            folder.write_scores({"round": folder.number, "step": start, "judges": self._names}, shown_PKR)
        means = {name: float(np.nanmean(shown_PKR[..., r])) for r, name in enumerate(self._names)}
        if is_new or all(row.get("online/round") != folder.number for row in read_metrics(self._workdir)):
            scalars = {f"online/{name}": mean for name, mean in means.items()}
            self._loop.writer.scalars(start, {"online/round": folder.number, **scalars})
        self._result.write(folder.number)
        said = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        self._say(f"round {folder.number + 1}/{self._config.online.rounds} at step {start}: {said}")

    def _tell_undecided(self, number: int, decided_P: np.ndarray) -> None:
        """Says how many prompts of a round teach nothing; ValueError where no prompt of `MOST_IDLE` rounds did."""
        undecided, total = int((~decided_P).sum()), len(decided_P)
        who = " and ".join(self._names)
        if 0 < undecided < total:
            self._say(f"round {number + 1}: by {who} no candidate of {undecided} of {total} prompts is better")
        if undecided == total:
            self._say(
                f"warning: round {number + 1}: by {who} no candidate of {total} prompts is better than another; "
                "nothing is learned from this round"
            )
        self._count_idle(undecided < total)
        if self._judges and self._idle == min(MOST_IDLE, self._config.online.rounds):
            first = "the first round" if self._idle == 1 else f"the first {self._idle} rounds"
            raise UserError(
                f"by {who} no candidate of {first} is better than another, so nothing can be learned; correct "
                "config.online.judges, or raise online.candidates, and begin another --workdir"
            )

    def _count_idle(self, is_decided: bool) -> None:
        self._idle = None if is_decided or self._idle is None else self._idle + 1

    def _said(self, folder: RoundFolder, found: Sequence[Rewards]) -> np.ndarray:
        """shown_PKR: by judges, as it was found, or by people."""
        if self._judges:
            return np.stack([rewards.shown_KR for rewards in found])
        files = self._feedback or folder.feedback()
        return read_feedback(files, len(folder.prompts), self._config.online.candidates)[..., None]

    def _shown(self, folder: RoundFolder) -> np.ndarray:
        """[P, K, R], from `scores.json`."""
        shown_PKR = np.zeros((len(folder.prompts), *self._shape_KR))
        with cluster.together(f"reading what was said of round {folder.number}"):
            if cluster.is_first():
                shown_PKR = _there(folder, folder.read_scores(self._shape_KR))
        return cluster.says_first(shown_PKR)

    @property
    def _shape_KR(self) -> tuple[int, int]:
        """Images of a prompt, and scores of each."""
        return 1 if self._config.online.branching else self._config.online.candidates, len(self._names)

    def _remove_trajectories(self, last: int) -> None:
        """Of the rounds up to `last` that no checkpoint is in the middle of."""
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
