"""A step that is not finite names its records and keeps its batch, and a replay finds the cause."""

import io
import itertools
import re
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest

from dpo_jax.batch import Cached, PreferenceBatch, Raw, Sampled, Transitions
from dpo_jax.training import replay as module
from dpo_jax.training import trainer
from dpo_jax.training.replay import lines_about, read_batch, replay, write_batch
from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import train


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_config):
    """(config, work directory, error) of a run whose fourth step had an example that is not finite; B = 4."""
    workdir = tmp_path_factory.mktemp("stopped")
    config = tiny_config("sd15", steps=6, **{"optimizer.max_skips": 0})
    open_batches = trainer.open_training_batches

    def poisoned(*arguments):
        batches = open_batches(*arguments)

        class Poisoned(type(batches)):
            def __next__(self):
                position = self.get_state()["position"]
                batch = super().__next__()
                if position == 12:
                    batch.preference_BK[2] = np.nan
                return batch

        batches.__class__ = Poisoned
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_training_batches", poisoned)
        with pytest.raises(ValueError, match="not finite") as raised:
            train(config, workdir)
    return config, workdir, str(raised.value)


def test_the_error_names_a_record_and_where_the_batch_is(stopped) -> None:
    _, workdir, error = stopped
    file = workdir / "errors" / "step_000004.npz"
    assert re.match(r"train/loss is nan at step 4; last good checkpoint: step 2 in .*learning_rate", error)
    assert re.search(rf"the batch of made pair (\d+) '.*' and 3 more examples is kept in {file} \(to see", error)
    names = file.with_suffix(".txt").read_text().splitlines()
    step, batch, kept = read_batch(file)
    assert (step, kept) == (4, names)
    assert batch.index_B.tolist() == [12, 13, 14, 15]
    for name in names:  # the caption is the one of the record, unless it was dropped
        number, caption = re.fullmatch(r"made pair (\d+) '(.*)'", name).groups()
        assert caption in ("", f"made pair number {number}")


def test_the_last_good_checkpoint_stays(stopped) -> None:
    _, workdir, _ = stopped
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert all(np.isfinite(p).all() for p in open_run(workdir).params.values())


def test_a_replay_finds_the_example(stopped) -> None:
    config, workdir, _ = stopped
    before = sorted(workdir.rglob("*"))
    lines: list[str] = []
    replay(config, workdir, workdir / "errors" / "step_000004.npz", lines.append)
    name = (workdir / "errors" / "step_000004.txt").read_text().splitlines()[2]
    assert lines[0] == "step 4 in float32, with the weights of step 2:"
    assert lines[1] == "  1 of 4 examples are not finite:"
    assert lines[2].split()[:3] == ["loss", "error/drift", "error/loser"]
    assert {"log-ratio/winner", "log-ratio/loser"} < set(lines[2].split())
    assert lines[3].split()[0] == "nan"
    assert lines[3].endswith(name)
    assert re.fullmatch(r"  the whole step: train/loss nan  train/gradient_norm nan  train/update_norm \S+", lines[4])
    assert len(lines) == 5  # float32 is the dtype of the config
    assert sorted(workdir.rglob("*")) == before


def test_figures_that_are_finite_are_told_as_such() -> None:
    names = [f"example {i}" for i in range(30)]
    figures = {"loss": np.arange(30.0), "error/winner": np.ones(30)}
    lines = lines_about(figures, names)
    assert lines[0].startswith("all figures of 30 examples are finite; the weights have changed")
    assert lines[2].split() == ["29", "1", "example", "29"]
    assert lines[-1] == "and 10 more"
    figures["error/winner"][[3, 5]] = np.nan, np.inf
    assert [line.split()[-1] for line in lines_about(figures, names)] == ["finite:", "example", "3", "5"]


def batch_of(inputs) -> PreferenceBatch:
    shapes = {"size_cond_BK6": (3, 2, 6), "preference_BK": (3, 2), "valid_BK": (3, 2), "weight_B": 3, "index_B": 3}
    counter = itertools.count()
    return PreferenceBatch(
        inputs, **{name: np.full(shape, next(counter), np.float32) for name, shape in shapes.items()}
    )


ONES = np.ones((3, 2), np.float32)
HALVES = np.full((3, 2), 0.5, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "inputs",
    [Raw(ONES, ONES, ONES), Cached(HALVES, HALVES, HALVES), Sampled(Transitions(ONES, ONES, ONES, ONES), ONES, ONES)],
)
def test_every_kind_of_batch_is_read_as_it_was_written(tmp_path, inputs) -> None:
    batch = batch_of(inputs)
    step, read, names = read_batch(write_batch(tmp_path, 7, batch, ["a", "b", "c"]))
    assert (step, names) == (7, ["a", "b", "c"])
    assert jax.tree.structure(read) == jax.tree.structure(batch)
    jax.tree.map(np.testing.assert_array_equal, read, batch)
    assert [x.dtype for x in jax.tree.leaves(read)] == [x.dtype for x in jax.tree.leaves(batch)]


def test_weights_of_cells_are_kept_too(tmp_path) -> None:
    batch = batch_of(Raw(ONES, ONES, ONES))._replace(cell_weight_BKhw=np.ones((3, 2, 4, 4), np.float32))
    _, read, _ = read_batch(write_batch(tmp_path, 7, batch, ["a", "b", "c"]))
    jax.tree.map(np.testing.assert_array_equal, read, batch)


def test_token_ids_with_an_axis_for_text_encoders_are_read_too(tmp_path) -> None:
    ids_BMEL = np.arange(3 * 2 * 2 * 4).reshape(3, 2, 2, 4)
    path = write_batch(tmp_path, 7, batch_of(Raw(ONES, ONES, ids_BMEL)), ["a", "b", "c"])
    with np.load(path) as found:
        arrays = dict(found)
    np.savez(path, **{name.replace("_BML", "_BMEL"): array for name, array in arrays.items()})
    _, read, _ = read_batch(path)
    np.testing.assert_array_equal(read.inputs.token_ids_BML, np.concatenate(np.moveaxis(ids_BMEL, 2, 0), axis=-1))


def test_a_batch_that_is_too_large_is_cut(tmp_path, monkeypatch) -> None:
    batch = batch_of(Raw(ONES, ONES, ONES))
    monkeypatch.setattr(module, "MAX_BYTES", sum(x.nbytes for x in jax.tree.leaves(batch)) * 2 // 3 + 1)
    path = write_batch(tmp_path, 7, batch, ["a", "b", "c"])
    monkeypatch.undo()
    _, read, names = read_batch(path)
    assert names == ["a", "b"]
    assert {len(x) for x in jax.tree.leaves(read)} == {2}
    assert path.with_suffix(".txt").read_text() == "a\nb\nc\n"


def saved(save: Callable[..., None], **arrays: np.ndarray) -> bytearray:
    file = io.BytesIO()
    save(file, *arrays.values()) if save is np.save else save(file, **arrays)
    return bytearray(file.getvalue())


COMPRESSED = saved(np.savez_compressed, kind=np.array("Raw" * 1000))
COMPRESSED[60:90] = b"\xff" * 30


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 broken", b"text", saved(np.save, a=np.zeros(3)), COMPRESSED])
def test_another_file_is_no_batch(tmp_path, data) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is not a batch that a run kept in WORKDIR/errors, or is damaged"):
        read_batch(tmp_path / "a.npz")
