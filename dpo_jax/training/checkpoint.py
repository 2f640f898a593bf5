"""Checkpoints: Orbax, asynchronous, atomic, the newest few kept.

A work directory holds `config.json` (the resolved experiment) and `checkpoints/STEP/` with two items: `state` (step,
trained parameters, optimizer state, moving average) and `position` (samples seen, which places the data stream exactly,
whatever the number of processes or loader workers, as {"position": N}).
"""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax.training.step import TrainState
from dpo_jax.weights.layout import Params


class Checkpoints:
    """Saves and restores the training state under `workdir/checkpoints`."""

    def __init__(self, workdir: epath.PathLike, *, keep: int):
        self.folder = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Copies the state to the host and returns; the write goes on in the background."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """The newest checkpoint: the state, placed like `abstract`, and the data position."""
        step = self.latest_step()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract._asdict()), position=ocp.args.JsonRestore()
            ),
        )
        return TrainState(**restored["state"]), restored["position"]

    def close(self) -> None:
        """Waits for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def latest_step(workdir: epath.PathLike) -> int | None:
    """The newest finished checkpoint of a work directory; writes nothing."""
    folder = epath.Path(workdir).absolute() / "checkpoints"
    if not folder.exists():
        return None
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        return manager.latest_step()


def restore_params(workdir: epath.PathLike, abstract: Params, item: str) -> tuple[Params, int]:
    """The newest checkpoint's "params" or "ema" alone, placed like `abstract`, and its step; nothing else is read."""
    folder = epath.Path(workdir).absolute() / "checkpoints"
    step = latest_step(workdir)
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {folder} yet; let python -m dpo_jax.train reach its first one")
    restored = ocp.PyTreeCheckpointer().restore(
        folder / str(step) / "state",
        args=ocp.args.PyTreeRestore(
            {item: abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({item: abstract}),
            partial_restore=True,
        ),
    )
    return restored[item], step


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """What `write_config` wrote, or None in a new work directory."""
    path = epath.Path(workdir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_config(workdir: epath.PathLike, flat: dict[str, Any]) -> None:
    """Records the fields of the experiment, whole or not at all, by the first process."""
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".config.json.unfinished"
        unfinished.write_text(json.dumps(flat, indent=2) + "\n")
        unfinished.replace(folder / "config.json")
