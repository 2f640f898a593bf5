"""Makes batches of samples: what is quick is planned first, then threads write the inputs of each example in place.

Axes: B prompts, K candidates (best first), h x w latent cells, N records.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.batch import Cached, PreferenceBatch, Raw
from dpo_jax.data import images
from dpo_jax.data.load.buffer_pool import Pool
from dpo_jax.data.load.inputs import Example, Inputs, ViewDraws
from dpo_jax.data.load.masks import cell_weights
from dpo_jax.data.load.records import TrainingRecords
from dpo_jax.data.store.latents import DamagedLatents
from dpo_jax.data.store.prepared import lines_of

SizeConditioning = Literal["constant", "real"]


class Sample(NamedTuple):
    """One position of the stream: the record that it shows, and how."""

    position: int
    """Position in the stream."""
    number: int
    """Index of the record among those to train on."""
    counts: bool = True
    """False gives it weight 0."""
    drop_caption: float = 1.0
    """A number in [0, 1): below the probability of caption dropout the caption is dropped."""
    draws: ViewDraws | None = None


class Skipped(NamedTuple):
    """A record that was left out."""

    number: int
    """Index of the record among those to train on."""
    reason: str
    is_damaged: bool = True
    """False for an undamaged record with a mask that is black in this view."""


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """Turns samples into a batch: first everything that is quick, then the inputs of each example, in threads.

    With `bucket_N`, the number of the shape of each record, all samples of a batch must have the same shape.
    """

    inputs: Inputs
    records: TrainingRecords
    size_conditioning: SizeConditioning
    caption_lines: bool = False
    caption_dropout: float = 0.0
    mask_floor: float | None = None
    bucket_N: np.ndarray | None = None

    def plan(self, samples: Sequence[Sample]) -> tuple[dict[str, np.ndarray], list[Example]]:
        """Return the fields of a batch except its inputs, and its examples; absent candidates are not valid."""
        records = [self.records[sample.number] for sample in samples]
        B, K, shape = len(samples), self.records.num_candidates, self._shape(samples[0])
        preference_BK, valid_BK = np.zeros((B, K), np.float32), np.zeros((B, K), bool)
        for b, record in enumerate(records):
            number = len(record["images"])
            preference_BK[b, :number], valid_BK[b, :number] = record["preference"], True
        size_cond_BK6 = np.empty((B, K, 6), np.float32)
        size_cond_BK6[:] = *shape, 0, 0, *shape
        weights = [sample.counts * record["weight"] for sample, record in zip(samples, records, strict=True)]
        planned = {
            "size_cond_BK6": size_cond_BK6,
            "preference_BK": preference_BK,
            "valid_BK": valid_BK,
            "weight_B": np.asarray(weights, np.float32),
            "index_B": np.asarray([sample.position for sample in samples], np.int32),
        }
        if self.mask_floor is not None:
            cells = (side // self.inputs.pixels_a_cell for side in shape)
            planned["cell_weight_BKhw"] = np.ones((B, K, *cells), np.float32)
        return planned, [self._example(*each, shape) for each in zip(range(B), samples, records, strict=True)]

    def _shape(self, sample: Sample) -> images.Shape:
        return self.inputs.shapes[0 if self.bucket_N is None else self.bucket_N[sample.number]]

    def _example(self, number: int, sample: Sample, record: dict[str, Any], shape: images.Shape) -> Example:
        captions = record["captions"] + [""] * (self.records.num_captions - len(record["captions"]))
        if sample.drop_caption < self.caption_dropout:
            captions = [""] * len(captions)
        elif self.caption_lines:
            captions = [self._line(caption, sample) for caption in captions]
        return Example(number, sample.number, record, captions, sample.draws, shape)

    def _line(self, caption: str, sample: Sample) -> str:
        """Draw a line of a caption with the number that kept the caption, which is uniform from the dropout to 1."""
        lines = lines_of(caption)
        share = (sample.drop_caption - self.caption_dropout) / (1 - self.caption_dropout)
        return lines[0 if sample.draws is None else int(share * len(lines))]

    def allocate(self, pool: Pool, examples: Sequence[Example]) -> Raw | Cached:
        records = self.records
        shape = examples[0].shape
        return self.inputs.allocate(pool, len(examples), records.num_candidates, records.num_captions, shape)

    def fill(self, batch: PreferenceBatch, examples: Sequence[Example]) -> list[Skipped]:
        """Write the inputs of examples into the batch, with 0 for candidates that a record lacks."""
        try:
            return self._fill(batch, examples)
        except (images.DamagedImage, DamagedLatents):  # one of them is damaged; the others are filled again
            return [skipped for example in examples for skipped in self._fill_or_skip(batch, example)]

    def _fill_or_skip(self, batch: PreferenceBatch, example: Example) -> list[Skipped]:
        try:
            return self._fill(batch, [example])
        except (images.DamagedImage, DamagedLatents) as error:
            inputs: Any = batch.inputs
            for array in inputs:
                array[example.number] = 0
            batch.weight_B[example.number] = 0
            if batch.cell_weight_BKhw is not None:
                batch.cell_weight_BKhw[example.number] = 1
            return [Skipped(example.record_number, str(error))]

    def _fill(self, batch: PreferenceBatch, examples: Sequence[Example]) -> list[Skipped]:
        places = self.inputs.fill(batch.inputs, examples, self.records.read_images)
        if self.size_conditioning == "real":
            for example, places_K4 in zip(examples, places, strict=True):
                batch.size_cond_BK6[example.number, : len(places_K4), :4] = places_K4
        if self.mask_floor is None:
            return []
        return [skipped for example in examples if (skipped := self._fill_weights(batch, example, self.mask_floor))]

    def _fill_weights(self, batch: PreferenceBatch, example: Example, floor: float) -> Skipped | None:
        """Write the weights of the latent cells of an example; those of images without a mask are 1 already."""
        assert batch.cell_weight_BKhw is not None
        view, weight_Khw = self.inputs.view(example.draws), batch.cell_weight_BKhw[example.number]
        for k, position in enumerate(example.record["masks"]):
            if position < 0:
                continue
            (mask,) = self.records.read_images({"images": [position]})
            weight_hw = cell_weights(mask, view, example.shape, self.inputs.pixels_a_cell, floor)
            if weight_hw is None:
                weight_Khw[:] = 1
                batch.weight_B[example.number] = 0
                return Skipped(example.record_number, "a mask is black in the part that is cut out", is_damaged=False)
            weight_Khw[k] = weight_hw
        return None
