import io

import numpy as np
from PIL import Image

from dpo_jax.data.sources import SOURCES
from dpo_jax.tiny import judge, world
from tools.tiny import pairs


def test_judged_pairs_are_untied_disjoint_and_labelled_by_the_judge():
    rng = np.random.default_rng(0)

    def sample(captions, seeds):  # half of the images show something else
        shown = [caption if seed % 2 else world.captions()[seed] for caption, seed in zip(captions, seeds, strict=True)]
        return np.stack([world.render(caption, rng) for caption in shown])

    judged = pairs.judged_pairs(sample, world.captions()[:8], seeds_per_caption=10, num_pairs=30)
    assert len(judged) == 30
    assert len({image.tobytes() for pair in judged for image in pair.images}) == 60
    for pair in judged:
        first, second = judge.score(np.stack(pair.images), [pair.caption] * 2)
        assert pair.labels == ((1, 0) if first > second else (0, 1))
        assert first != second
    assert 5 < sum(pair.labels[0] for pair in judged) < 25


def test_the_file_has_the_schema_of_pick_a_pic_and_its_images_unchanged(tmp_path):
    written = pairs.rendered_pairs(world.captions(), 4)
    swapped = written[0]._replace(images=written[0].images[::-1], labels=(0.0, 1.0))
    pairs.write(tmp_path / "world.parquet", [*written, swapped])
    source = SOURCES["pickapic"]
    records = [row for chunk in source.chunks([tmp_path / "world.parquet"]) for row in source.read(chunk)]
    assert len(records) == 5
    for record, pair in zip(records, [*written, written[0]], strict=True):
        assert record.caption == pair.caption
        assert record.preference == (1.0, 0.0)
        assert record.models == ("world", "world")
        for data, image in zip(record.images, pair.images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_of_a_rendered_pair_the_first_is_right_and_the_second_wrong():
    rendered = pairs.rendered_pairs(world.split()[0], 50)
    captions = [pair.caption for pair in rendered]
    assert set(captions) <= set(world.split()[0])
    assert (judge.score(np.stack([pair.images[0] for pair in rendered]), captions) == 1).all()
    assert (judge.score(np.stack([pair.images[1] for pair in rendered]), captions) < 1).all()
