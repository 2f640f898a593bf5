"""Measures the memory and the bytes read when the full SDXL UNet is loaded from disk to its devices.

  python benchmarks/loading.py --json=loading.json

Writes the UNet with random float16 weights, 5.1 GB, to a temporary folder, as safetensors and then as legacy Flax
msgpack, and loads each into one process with one device, and into two processes with two devices each, every device
holding a quarter (mesh.fsdp=4). Each process reads its own copy, as on a machine of its own. It needs 12 GB of memory
and 12 GB of disk in the temporary folder (TMPDIR), and takes about seven minutes on two CPU cores. The last result is
committed beside this file. It reports for each process

  held      bytes of weights on its devices
  peak      anonymous memory (RssAnon of /proc/self/status, every 10 ms) above the start; pages of files, which the
            kernel may drop at any time, are not counted
  share     bytes of the file that hold its part of the weights
  read      bytes that the disk delivered on its behalf (read_bytes of /proc/self/io); the file is evicted from the page
            cache first
"""

import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
from absl import flags
from etils import epath
from flax import serialization, traverse_util

from dpo_jax import cli
from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.network import Network
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.io import load_params
from dpo_jax.weights.layout import Specs, flax_aliases, torch_name

ROOT = Path(__file__).parents[1]

CONFIG = flags.DEFINE_string("config", f"{PUBLISHED}/sdxl/unet/config.json", "config.json of the UNet.")
TINY = flags.DEFINE_bool("tiny", False, "Use a narrow UNet of 37 MB, to check that everything works.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")

NARROW = {
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 1, 1],
}
CASES = (  # processes, devices of each, dtype
    (1, 1, "bfloat16"),
    (1, 1, "float32"),
    (2, 2, "bfloat16"),
)


def main() -> None:
    config = json.loads(Path(CONFIG.value).read_text()) | (NARROW if TINY.value else {})
    specs = unet_specs(config)
    results = []
    for layout, write in (("safetensors", write_safetensors), ("flax msgpack", write_flax)):
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root, str(copy)) for copy in range(max(processes for processes, _, _ in CASES))]
            for folder in folders:
                folder.mkdir()
                write(folder, specs)
            for processes, devices, dtype in CASES:
                case = {"file": layout, "processes": processes, "devices": devices, "dtype": dtype}
                for figures in run(folders[:processes], specs, devices, dtype):
                    results.append({**case, **figures})
                    print(line(results[-1]), flush=True)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")


def run(folders: list[Path], specs: Specs, devices: int, dtype: str) -> list[dict[str, Any]]:
    """Return the figures of new processes, one per folder, that load the UNet together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with ProcessPoolExecutor(len(folders), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(load, folder, specs, devices, dtype, (address, len(folders), index))
            for index, folder in enumerate(folders)
        ]
        return [future.result() for future in futures]


def load(folder: Path, specs: Specs, devices: int, dtype: str, job: tuple[str, int, int]) -> dict[str, Any]:
    """Return the figures of a process that loads its part; `job` is (address, number of processes, own number)."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(*job)
    sharding = Placement(make_mesh(data=1, fsdp=-1))
    evict(folder)
    read_before, started = proc("io", "read_bytes"), time.time()
    with PeakMemory() as memory:
        params = load_params(folder, specs, dtype=dtype, sharding=sharding)
        jax.block_until_ready(params)
    shards = [shard for param in params.values() for shard in param.addressable_shards]
    parts = {(name, str(shard.index)): shard for name, param in params.items() for shard in param.addressable_shards}
    held = sum(shard.data.nbytes for shard in shards)
    share = sum(shard.data.size for shard in parts.values()) * np.dtype(np.float16).itemsize
    read = proc("io", "read_bytes") - read_before
    return {
        "seconds": round(time.time() - started, 1),
        "held_bytes": held,
        "memory_before": memory.before,
        "peak_bytes": memory.peak - memory.before,
        "peak_over_held": round((memory.peak - memory.before) / held, 3),
        "share_bytes": share,
        "read_bytes": read,
        "read_over_share": round(read / share, 3),
    }


class PeakMemory:
    """The largest anonymous memory of this process inside the block."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = proc("status", "RssAnon")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, proc("status", "RssAnon"))


def proc(file: str, field: str) -> int:
    """Return a field of /proc/self/FILE, in bytes."""
    (value,) = (row.split()[1:] for row in Path(f"/proc/self/{file}").read_text().splitlines() if row.startswith(field))
    return int(value[0]) * (1024 if value[1:] == ["kB"] else 1)


def line(result: dict[str, Any]) -> str:
    gigabytes = {name: result[name] / 1e9 for name in ("held_bytes", "peak_bytes", "share_bytes", "read_bytes")}
    return (
        f"{result['file']:12} {result['processes']} x {result['devices']} devices, {result['dtype']:8}: "
        "held {held_bytes:.3f} GB, peak {peak_bytes:.3f}, share {share_bytes:.3f}, read {read_bytes:.3f}".format(
            **gigabytes
        )
        + f"; {result['peak_over_held']:.3f} of held, {result['read_over_share']:.3f} of share; {result['seconds']} s"
    )


def unet_specs(config: dict[str, Any]) -> Specs:
    unet = UNetConfig.from_dict(config, "config")
    return Network.build(lambda rngs: UNet2DConditionModel(unet, dtype="bfloat16", rngs=rngs), unet).specs


def random_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return finite float16 numbers with random bits, which a disk cannot compress."""
    return np.random.default_rng(0).integers(0, 2**14, shape, dtype=np.uint16).view(np.float16)


def write_safetensors(folder: Path, specs: Specs) -> None:
    header = {torch_name(name): (spec.torch_shape, np.dtype(np.float16)) for name, spec in specs.items()}
    tensors = ((name, random_array(shape)) for name, (shape, _) in header.items())
    safetensors_file.write(epath.Path(folder / "diffusion_pytorch_model.safetensors"), tensors, header)


def write_flax(folder: Path, specs: Specs) -> None:
    tree = traverse_util.unflatten_dict({flax_aliases(name)[0]: spec.shape for name, spec in specs.items()}, sep=".")
    with (folder / "diffusion_flax_model.msgpack").open("wb") as file:
        file.writelines(flax_bytes(tree))


def flax_bytes(tree: dict[str, Any]) -> Iterator[bytes]:
    """Yield the bytes of flax.serialization.to_bytes for random arrays of the shapes in `tree`, array by array."""
    packer = msgpack.Packer()
    yield packer.pack_map_header(len(tree))
    for key, child in tree.items():
        yield packer.pack(key)
        if isinstance(child, dict):
            yield from flax_bytes(child)
        else:
            yield serialization.msgpack_serialize(random_array(child))


def evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    cli.run(main)
