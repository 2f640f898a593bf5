"""Single votes: which images they are, the share of liked ones, and that they resume anywhere."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_jax.data.load.inputs import RawInputs
from dpo_jax.data.load.pipeline import make_iterator, validation_batches
from dpo_jax.data.load.records import open_records
from dpo_jax.data.load.votes import VoteOrder, Votes
from dpo_jax.errors import UserError

from .conftest import encode, write_prepared


def spell(captions: Sequence[str]) -> np.ndarray:
    """Return the bytes of captions as token ids."""
    ids_NL = np.zeros((len(captions), 8), np.int32)
    for ids_L, caption in zip(ids_NL, captions, strict=True):
        ids_L[: len(caption)] = list(caption.encode())
    return ids_NL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a list of three, a tie, and two single images; every image has a grey of its own."""

    def images(*greys: int) -> list[bytes]:
        return [encode(np.full((8, 8, 3), grey, np.uint8), "PNG") for grey in greys]

    records: list[dict[str, Any]] = [
        {"caption": "a", "images": images(10, 11), "preference": [1.0, 0.0]},
        {"caption": "b", "captions": ["b1", "b2"], "images": images(20, 21), "preference": [0.75, 0.25]},
        {"caption": "c", "images": images(30, 31, 32), "preference": [0.5, 0.3, 0.2]},
        {"caption": "tie", "images": images(40, 41), "preference": [0.5, 0.5]},
        {"caption": "liked", "images": images(50), "preference": [1.0]},
        {"caption": "disliked", "images": images(60), "preference": [0.0]},
    ]
    return write_prepared(tmp_path_factory.mktemp("votes") / "out", records)


def rows(batches: Any) -> list[tuple[int, float, str]]:
    """Return (grey, vote, caption) of each example."""
    found = []
    for batch in batches:
        assert batch.preference_BK.shape[1] == 1
        for b in range(len(batch.index_B)):
            caption = bytes(int(n) for n in batch.inputs.token_ids_BML[b, 0] if n).decode(errors="replace")
            found.append((int(batch.inputs.images_BKHWC[b, 0, 0, 0, 0]), float(batch.preference_BK[b, 0]), caption))
    return found


def test_the_winner_is_liked_and_the_loser_disliked(folder: Path) -> None:
    votes = Votes(open_records(folder, "train", single_images=True))
    names = {(float(votes[i]["preference"][0]), votes[i]["captions"][0]) for i in range(len(votes))}
    assert names == {(1, "a"), (0, "a"), (1, "b1"), (0, "b2"), (1, "c"), (0, "c"), (1, "liked"), (0, "disliked")}
    assert votes.liked_V.tolist() == [bool(votes[i]["preference"][0]) for i in range(len(votes))]
    with validation_batches(votes, RawInputs(8, spell), batch_size=4) as batches:
        greys = {grey: vote for grey, vote, _ in rows(batches)}
    assert greys == {10: 1, 11: 0, 20: 1, 21: 0, 30: 1, 32: 0, 50: 1, 60: 0}


def test_the_share_is_exact_and_every_image_is_seen() -> None:
    liked_V = np.array([True, False] * 4)
    order = VoteOrder(liked_V, 3, 0.8)
    drawn = [order[position] for position in range(100)]
    assert [sum(liked_V[drawn[at : at + 5]]) for at in range(0, 100, 5)] == [4] * 20
    counts = np.bincount(drawn, minlength=8)
    assert counts.tolist() == [20, 5] * 4
    assert drawn != [VoteOrder(liked_V, 4, 0.8)[position] for position in range(100)]
    assert all(liked_V[VoteOrder(liked_V, 0, 1.0)[position]] for position in range(9))


def test_votes_are_the_same_on_any_number_of_processes_and_resume(folder: Path) -> None:
    records = open_records(folder, "train", single_images=True)

    def open_batches(**options: Any) -> Any:
        return make_iterator(records, RawInputs(8, spell), seed=1, positive_share=0.75, **options)

    with open_batches(batch_size=4) as whole:
        expected = rows(itertools.islice(whole, 4))
    assert sum(vote for _, vote, _ in expected) == 12
    with (
        open_batches(batch_size=2, shard_count=2) as one,
        open_batches(batch_size=2, shard_index=1, shard_count=2) as two,
    ):
        dealt = zip(rows(itertools.islice(one, 4)), rows(itertools.islice(two, 4)), strict=True)
        assert [row for pair in dealt for row in pair] == expected
    with open_batches(batch_size=4) as begun:
        next(begun)
        state = begun.get_state()
    with open_batches(batch_size=4) as resumed:
        resumed.set_state(state)
        assert rows(itertools.islice(resumed, 3)) == expected[4:]


def test_a_kind_that_the_data_lacks_is_told() -> None:
    with pytest.raises(UserError, match=r"positive_share=0\.8, but the training data has no disliked image"):
        VoteOrder(np.ones(3, bool), 0, 0.8)
    assert VoteOrder(np.ones(3, bool), 0, 1.0)[7] in range(3)
