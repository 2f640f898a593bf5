"""Checkpoints: written by Orbax, asynchronous, atomic, and verified when they are read.

A work directory holds `config.json` (the resolved experiment) and `checkpoints/STEP/` with four items: `state` (step,
trained parameters, optimizer state, averages, moving reference), `position` (examples seen, from which the data stream
continues exactly with any number of processes or loader workers, as {"position": N}), `checksums` of both, and
`config`, a copy of config.json in case that file is damaged. Damaged checkpoints are moved to `damaged_checkpoints/`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from dpo_jax import files, interrupts
from dpo_jax.errors import EnvironmentFault, MissingFileError, UserError
from dpo_jax.streams import warn
from dpo_jax.training.step import TrainState
from dpo_jax.weights.layout import Params

FALLBACKS = 3
"""Number of newest checkpoints that a resume may begin from if all are kept: the newest, or others if it is damaged."""


@dataclasses.dataclass
class KeepStep(PreservationPolicy):
    """Preserves the checkpoint of one step, which may become another one during a run."""

    step: int = -1
    """-1 for none."""

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """Saves the training state under `workdir/checkpoints`; removes what a killed run left half-written there.

    The step that is assigned to `best.step` stays, too.

    Args:
        workdir: receives the folder.
        keep: number of newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints of multiples of this many steps are kept, too; 0 for none.
        fields: of the experiment, as for `write_config`; a copy is kept with each checkpoint.
    """

    def __init__(
        self, workdir: epath.PathLike, *, keep: int, keep_every: int = 0, fields: Mapping[str, Any] | None = None
    ):
        self.folder = _folder(workdir)
        self._keep = keep
        self.best = KeepStep()
        self._fields = None if fields is None else _signed(fields)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep or None), self.best, *([EveryNSteps(keep_every)] if keep_every else [])]
            ),
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sync),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, also of one that is still being written."""
        return list(self._manager.all_steps())

    def oldest_to_resume(self) -> int | None:
        """Return the oldest step that a resume may begin from: that of the newest few finished checkpoints."""
        return min(sorted(ocp.utils.checkpoint_steps(self.folder))[-(self._keep or FALLBACKS) :], default=None)

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Copy the state to the host and return; it is written in the background.

        Raises:
            EnvironmentFault: the previous write has failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        tree = state._asdict()
        items = {
            "state": ocp.args.StandardSave(tree),
            "position": ocp.args.JsonSave(position),
            "checksums": ocp.args.JsonSave(checksums(tree) | position),
        }
        if self._fields is not None:
            items["config"] = ocp.args.JsonSave(self._fields)
        with self._failure_told():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _sync(self) -> None:
        """Flush a written checkpoint to the disk before it is renamed: Orbax does not flush small files."""
        if files.is_local(self.folder):
            for folder in self.folder.glob("*.orbax-checkpoint-tmp*"):
                files.sync_tree(folder)

    def check(self) -> None:
        """Raise EnvironmentFault if a write has failed by now."""
        with self._failure_told():
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for the last write; EnvironmentFault if it fails."""
        with self._failure_told():
            self._manager.wait_until_finished()
            self._manager.close()
            files.sync(self.folder)

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        """Report a failed write, and delay Ctrl-C: it would stop some of Orbax's threads in the middle of one."""
        try:
            with interrupts.held():
                yield
        except Exception as error:  # file systems and their libraries raise errors of many classes
            whole = max(ocp.utils.checkpoint_steps(self.folder), default=None)
            kept = "there is no earlier one" if whole is None else f"that of step {whole} is whole"
            raise EnvironmentFault(
                f"a checkpoint could not be written to {self.folder} ({_first_line(error)}); {kept}. Make room or "
                "allow writing there, then run the same command again"
            ) from error


def restore(workdir: epath.PathLike, abstract: TrainState) -> tuple[TrainState, dict[str, int]] | None:
    """Return the state of the newest whole checkpoint, placed like `abstract`, and its position in the data, or None.

    Newer, damaged checkpoints are moved aside with a warning. All processes read the same one.

    Raises:
        UserError: all are damaged.
    """
    found = _newest_whole(workdir, abstract._asdict(), move_damaged=True)
    if found is None:
        return None
    state, position, _ = found
    return TrainState(**state), position


def restore_params(workdir: epath.PathLike, abstract: Params, item: str, step: int | None = None) -> tuple[Params, int]:
    """Return "params" or "ema" of one checkpoint, placed like `abstract`, and its step.

    Args:
        workdir: of a training run.
        abstract: shapes and places of the weights.
        item: "params" or "ema".
        step: which checkpoint; None takes the newest whole one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if step is not None:
        tree, _, reason = _read(_folder(workdir) / str(step), {item: abstract})
        if reason is not None:
            others = ", ".join(str(other) for other in finished_steps(workdir) if other != step) or "none"
            raise UserError(
                f"checkpoint {_folder(workdir) / str(step)} is damaged: {reason}; there are checkpoints of other "
                f"steps: {others}"
            )
        return tree[item], step
    found = _newest_whole(workdir, {item: abstract}, move_damaged=False)
    if found is None:
        folder = _folder(workdir)
        raise MissingFileError(
            f"{folder} has no checkpoint yet; let training reach its first one (config.checkpoint.every)"
        )
    tree, _, newest = found
    return tree[item], newest


def latest_step(workdir: epath.PathLike, *, before: int | None = None) -> int | None:
    """Return the step of the newest finished checkpoint, as the first process sees it, or None; writes nothing."""
    folder, newest = _folder(workdir), -1
    if jax.process_index() == 0 and folder.exists():
        steps = ocp.utils.checkpoint_steps(folder)
        newest = max((step for step in steps if before is None or step < before), default=-1)
    if jax.process_count() > 1:
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    return None if newest < 0 else newest


def checksums(tree: Any) -> dict[str, int]:
    """Return a number for each array, the same on any mesh, that changes with any word of the array.

    File systems and disks sometimes return wrong bytes, and Orbax's own checksums cover only its indexes. These are of
    the arrays that training computed, and are compared with the arrays that a resume uses, so they cover every copy in
    between.
    """
    sums = jax.device_get(_checksums(tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit  # one program: many small ones that sum over XLA's CPU devices at once can deadlock
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


@jax.jit  # jitted inside the other so that it is traced once per shape, and a UNet has few shapes
def _checksum(x: jax.Array) -> jax.Array:
    """Return the sum modulo 2^32 of all words, each times an odd number made of its position, in any order."""
    words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):  # not ravel, which would gather arrays that are split over devices
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _newest_whole(
    workdir: epath.PathLike, abstract: dict[str, Any], *, move_damaged: bool
) -> tuple[dict[str, Any], dict[str, int], int] | None:
    """Return (arrays of `abstract`, position in the data, step) of the newest checkpoint that is not damaged."""
    damaged: dict[int, str] = {}
    step = latest_step(workdir)
    while step is not None:
        tree, position, reason = _read(_folder(workdir) / str(step), abstract)
        if reason is None:
            # Only after another one was read: if none can be, the cause is more likely elsewhere and may pass.
            for number, why in damaged.items():
                _tell_damaged(workdir, number, why, move=move_damaged)
            return tree, position, step
        damaged[step] = reason
        step = latest_step(workdir, before=step)
    if damaged:
        reasons = "; ".join(f"step {number}: {why}" for number, why in damaged.items())
        raise UserError(
            f"no checkpoint in {_folder(workdir)} is whole ({reasons}); if the disk is healthy, restore a "
            "checkpoint from a backup, or remove that folder to train from the start"
        )
    return None


def _read(folder: epath.Path, abstract: dict[str, Any]) -> tuple[Any, Any, str | None]:
    """Return arrays and position, or the reason why they cannot be read; all processes return the same reason."""
    tree: Any = None
    position: dict[str, int] = {}
    expected: dict[str, int] = {}
    reason: str | None = None
    try:
        files.check_tree(folder)  # reading from a pipe would never end
        # Not through the manager, which waits for all processes: one that fails would never arrive.
        tree = ocp.PyTreeCheckpointHandler().restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
            ),
        )
        position = files.read_json(folder / "position" / "metadata", dict[str, int])
        expected = files.read_json(folder / "checksums" / "metadata", dict[str, int])
    except Exception as error:  # damaged files raise errors of almost any class
        reason = _first_line(error)
    reason = _agreed(reason)
    if reason is None:
        found = checksums(tree) | position
        names = [
            *found,
            *(name for name in expected if not name.startswith("[")),
        ]  # names without "[" are those of the position
        wrong = [name for name in names if name not in found or found[name] != expected.get(name)]
        reason = _agreed(f"{len(wrong)} values are not those that were saved, such as {wrong[0]}" if wrong else None)
    return tree, position, reason


def _agreed(reason: str | None) -> str | None:
    """Return a reason if any process has one."""
    if jax.process_count() == 1:
        return reason
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(reason is not None)))
    return reason or (f"process {failed[0]} could not read it" if failed.size else None)


def _tell_damaged(workdir: epath.PathLike, step: int, why: str, *, move: bool) -> None:
    if jax.process_index():
        return
    folder, aside = _folder(workdir) / str(step), epath.Path(workdir) / "damaged_checkpoints" / str(step)
    if move:
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            aside.rmtree()
        folder.rename(aside)
    warn(f"checkpoint {aside if move else folder} is damaged and not used: {why}")


def _folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir).absolute() / "checkpoints"


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].split(". See full")[0]
    return line if len(line) < 200 else f"{line[:80]} ... {line[-110:]}"  # the beginning and the end say most


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Return what `write_config` wrote, or None in a new work directory.

    Where config.json is damaged or missing the newest checkpoint's copy is returned, with a warning; ValueError where
    the file is damaged and there is no copy.
    """
    path = epath.Path(workdir) / "config.json"
    found = path.exists()
    try:
        if found:
            return _checked(path)
        problem = f"{path} is missing"
    except ValueError as error:
        problem = str(error)
    for step in reversed(finished_steps(workdir)):
        copy = _folder(workdir) / str(step) / "config" / "metadata"
        try:
            fields = _checked(copy)
        except (OSError, ValueError):  # written before checkpoints had copies, or damaged too
            continue
        if jax.process_index() == 0:
            warn(f"{problem}; its copy {copy} is used instead")
        return fields
    if found:
        raise UserError(
            f"{problem}, and no checkpoint in {_folder(workdir)} has a copy of it; restore the file from a backup, or "
            "choose another work directory"
        )
    return None


def write_config(workdir: epath.PathLike, fields: Mapping[str, Any]) -> None:
    """Write the fields of the experiment to config.json, completely or not at all, by the first process."""
    if jax.process_index() == 0:
        files.write_whole(epath.Path(workdir) / "config.json", json.dumps(_signed(fields), indent=2) + "\n")


def _signed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, "checksum": _digest(fields)}


def _checked(path: epath.Path) -> dict[str, Any]:
    """Return the fields of a file that `_signed` made (old ones have no checksum); UserError if it is damaged."""
    fields: dict[str, Any] = files.read_json(path, dict[str, Any])
    checksum = fields.pop("checksum", None)
    if checksum is not None and checksum != _digest(fields):
        raise UserError(f"{path} is damaged or was edited: its checksum does not match its fields")
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def finished_steps(workdir: epath.PathLike) -> list[int]:
    """Return the steps that have finished checkpoints, in order."""
    folder = _folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
