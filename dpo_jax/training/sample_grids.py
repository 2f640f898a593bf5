"""Draws the image grids of a run: the policy beside what it is compared with."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from dpo_jax.data.image_grid import image_grid
from dpo_jax.sampling.generate import Generator
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.model import for_sampling, load_encoders, load_unet, make_generator
from dpo_jax.training.watch import count_blank
from dpo_jax.weights.layout import Params


class SampleGrids:
    """Grids of `config.sample`: a row per caption, the policy beside what it is compared with, from the same noise.

    That is the reference of the loss or, if it moves or there is none, the base model that training began with.
    """

    def __init__(self, experiment: Experiment, report: Callable[[str], None]):
        """Draw nothing yet; `report` is told about images that are not finite."""
        self.experiment, self.config, self.report = experiment, experiment.config, report
        self._has_reference = experiment.objective.needs_reference and not self.config.moving_reference.every
        self._generator: Generator | None = None
        self._compared_images: np.ndarray | None = None
        """Images that the policy's images are shown next to."""

    def draw(self, params: Params) -> tuple[Image.Image, int]:
        """Return the grid of a policy with these trained weights, and how many of its images only it drew blank."""
        sample = self.config.sample
        captions = [caption for caption in sample.prompts for _ in range(sample.seeds)]
        seeds = list(range(len(captions)))
        if self._generator is None:
            e = self.experiment
            self._generator = make_generator(
                self.config, e.pipeline, self._encoders, e.placement, batch_size=len(captions), report=self.report
            )
            self._compared_images = self._generator(self._compared_with(), captions, seeds)
        policy = self.experiment.frozen.policy(for_sampling(self.experiment.pipeline, params))
        images = self._generator(policy, captions, seeds)
        compared = self._compared_images
        assert compared is not None
        rows = []
        for p, caption in enumerate(sample.prompts):
            cells = range(p * sample.seeds, (p + 1) * sample.seeds)
            rows.append((caption, [image for i in cells for image in (compared[i], images[i])]))
        beside = "reference" if self._has_reference else "base"
        grid = image_grid(rows, [beside, "policy"] * sample.seeds)
        return grid, count_blank(images, compared)

    def _compared_with(self) -> Params:
        """Return the weights that the policy's images are compared with, in the compute dtype."""
        e = self.experiment
        if self._has_reference:
            return e.frozen.whole_reference()
        if e.adapter is None:
            return load_unet(e.pipeline, e.placement)  # read again, and kept only while its images are drawn
        return e.frozen.policy(for_sampling(e.pipeline, e.adapter) if self.config.lora.init else {})

    def _encoders(self) -> Mapping[str, Params]:
        """Return the VAE and text encoders; a run on stored latents loads them only while it samples."""
        e = self.experiment
        return e.frozen.encoders or load_encoders(self.config, e.pipeline, e.placement)
