"""Draws the image grids of a run, the policy beside what it is compared with, and lets a judge score their images."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dpo_jax.data.image_grid import image_grid
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.rewards import Judge, open_judge
from dpo_jax.rewards.together import ask_together
from dpo_jax.sampling.generate import Generator
from dpo_jax.sharding import batch_parts
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.figures import score_figure
from dpo_jax.training.model import for_sampling, load_denoiser, load_encoders, make_generator
from dpo_jax.training.watch import count_blank
from dpo_jax.weights.layout import Params

IMAGES_AT_A_TIME = 2
"""Images of a grid that a device draws at a time. The VAE's decoder needs 2.5 GiB for each of SDXL's in float32, while
the state of the training is in memory."""


def images_of_grid(config: ConfigDict) -> int:
    """Return the number of images of the policy in a grid; 0 if none is drawn."""
    return len(config.sample.prompts) * config.sample.seeds if config.sample.every else 0


def open_sample_judge(config: ConfigDict) -> Judge | None:
    """Open `sample.judge`; None if the run scores no image grids.

    Raises:
        UserError: there is no such judge, or it lacks what it needs.
    """
    spec = config.sample.judge
    if not (spec and config.sample.every):
        return None
    try:
        return open_judge(spec)
    except (UserError, FileNotFoundError) as error:
        kind = type(error) if isinstance(error, UserError) else MissingFileError
        raise kind(f"config.sample.judge={spec}: {error}") from error


class SampleGrid(NamedTuple):
    """The images of a step."""

    image: Image.Image
    """All of them beside what they are compared with."""
    blank: int
    """How many are blank, unlike those that they are compared with."""
    scores: dict[str, float]
    """Mean scores by the judge, as `score_figure` names them; empty without one."""


class SampleGrids:
    """Grids of `config.sample`: a row per caption, the policy beside what it is compared with, from the same noise.

    That is the reference of the loss or, if it moves or there is none, the base model that training began with.
    """

    def __init__(self, experiment: Experiment, report: Callable[[str], None], judge: Judge | None = None):
        """Draw nothing yet; `report` is told about images that are not finite, and `judge` scores images."""
        self.experiment, self.config, self.report, self.judge = experiment, experiment.config, report, judge
        self._has_reference = experiment.objective.needs_reference and not self.config.moving_reference.every
        self._generator: Generator | None = None
        self._compared_images: np.ndarray | None = None
        """Images that the policy's images are shown next to."""
        self._compared_score = 0.0
        """Their mean score, if there is a judge."""

    def draw(self, params: Params) -> SampleGrid:
        """Return the grid of a policy with these trained weights."""
        sample = self.config.sample
        captions = [caption for caption in sample.prompts for _ in range(sample.seeds)]
        seeds = list(range(len(captions)))
        if self._generator is None:
            e = self.experiment
            batch_size = min(len(captions), IMAGES_AT_A_TIME * batch_parts(e.mesh))
            self._generator = make_generator(
                self.config, e.pipeline, self._encoders, e.placement, batch_size=batch_size, report=self.report
            )
            self._compared_images = self._generator(self._compared_with(), captions, seeds)
            if self.judge:
                self._compared_score = _mean_score(self.judge, self._compared_images, captions)
        policy = self.experiment.frozen.policy(for_sampling(self.experiment.pipeline, params))
        images = self._generator(policy, captions, seeds)
        compared = self._compared_images
        assert compared is not None
        rows = []
        for p, caption in enumerate(sample.prompts):
            cells = range(p * sample.seeds, (p + 1) * sample.seeds)
            rows.append((caption, [image for i in cells for image in (compared[i], images[i])]))
        beside = "reference" if self._has_reference else "base"
        scores = {}
        if self.judge:
            scores[score_figure(self.judge.name)] = _mean_score(self.judge, images, captions)
            scores[score_figure(self.judge.name, beside)] = self._compared_score
        grid = image_grid(rows, [beside, "policy"] * sample.seeds)
        return SampleGrid(grid, count_blank(images, compared), scores)

    def _compared_with(self) -> Params:
        """Return the weights that the policy's images are compared with, in the compute dtype."""
        e = self.experiment
        if self._has_reference:
            return e.frozen.whole_reference()
        if e.adapter is None:
            return load_denoiser(e.pipeline, e.placement)  # read again, and kept only while its images are drawn
        return e.frozen.policy(for_sampling(e.pipeline, e.adapter) if self.config.lora.init else {})

    def _encoders(self) -> Mapping[str, Params]:
        """Return the VAE and text encoders; a run on stored latents loads them only while it samples."""
        e = self.experiment
        held = e.frozen.encoders
        missing = e.pipeline.components.keys() - {e.pipeline.denoiser_name, *held}
        return {**held, **load_encoders(self.config, e.pipeline, e.placement, missing)}


def _mean_score(judge: Judge, images: np.ndarray, captions: Sequence[str]) -> float:
    return float(ask_together([judge], images, captions).mean(dtype=float))
