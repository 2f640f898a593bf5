"""Measures whether prepare needs more memory for ten times the records, and how two workers share a small input.

  python benchmarks/prepare.py --json=prepare.json

Makes files of Pick-a-Pic's schema in a temporary folder (TMPDIR, 4 GB) and prepares them, each time in a new process:

  records      20,000 pairs of tiny images that are all different, and ten times as many
  row group    1,000 pairs with 500 KB per image in one row group, in pages of one row, and in one page, as pyarrow
               writes them by default
  small input  1,200 pairs of 512 x 512 pixels, with one worker and with two, which take turns

It takes about five minutes on two CPU cores. The last result is committed beside this file. It reports for each

  main, worker  peak anonymous memory (RssAnon of /proc/PID/status, every 10 ms) of the main process and of its largest
                worker; pages of files, which the kernel may drop at any time, are not counted
  cpu, busiest  user and system time of all processes together, and of the busiest one: the time that two workers would
                take on two cores of their own
"""

import io
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from PIL import Image

from dpo_jax import cli
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import SOURCES

TINY = flags.DEFINE_bool("tiny", False, "Run with a hundredth of the data, to check that everything works.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")

SCHEMA = pa.schema({"jpg_0": pa.binary(), "jpg_1": pa.binary(), "caption": pa.string(), "label_0": pa.float64()})
ROWS_A_FILE = 10_000


def main() -> None:
    scale, rounds = (100, 1) if TINY.value else (1, 3)
    results = []
    with tempfile.TemporaryDirectory() as root:
        for times in (1, 10):
            folder = Path(root, f"records{times}")
            write(folder, times * 20_000 // scale, padded(8, "PNG", 0), rows_a_group=1000, rows_a_page=1000)
            results.append(run("records", folder, workers=2))
        once, ten_times = results
        growth = (ten_times["main_bytes"] - once["main_bytes"]) / (ten_times["records"] - once["records"])
        print(f"growth of main: {growth:.0f} bytes a record")
        for rows_a_page in (1, 1000):
            folder = Path(root, f"pages{rows_a_page}")
            write(folder, 1000 // scale, padded(8, "PNG", 500_000), rows_a_group=1000, rows_a_page=rows_a_page)
            results.append(run("row group", folder, workers=1) | {"rows_a_page": rows_a_page})
        folder = Path(root, "small")
        write(folder, 1200 // scale, padded(512, "JPEG", 0), rows_a_group=100 // scale, rows_a_page=100)
        results += [run("small input", folder, workers) for _ in range(rounds) for workers in (1, 2)]
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=2) + "\n")


def run(case: str, folder: Path, workers: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures = pool.submit(measure, folder, workers).result()
    result = {"case": case, "workers": workers, **figures}
    print(line(result), flush=True)
    return result


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Return the memory and the time of this process and its workers for preparing the files in `folder`."""
    started, cpu_before = time.time(), all_cpu_seconds()
    with Watch() as watch, tempfile.TemporaryDirectory(dir=folder.parent) as output:
        summary = prepare(SOURCES["pickapic"], sorted(folder.iterdir()), Path(output), workers=workers)
    seconds = time.time() - started
    return {
        "records": summary.records,
        "images": summary.images,
        "main_bytes": watch.main,
        "worker_bytes": watch.worker,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(all_cpu_seconds() - cpu_before, 1),
        "busiest_cpu_seconds": round(watch.busiest, 1),
        "records_per_second": round(summary.records / seconds),
    }


class Watch:
    """The peak memory of this process and of its workers, and the CPU time of the busiest worker, inside the block."""

    def __enter__(self) -> "Watch":
        self.main = self.worker = 0
        self.busiest = 0.0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        workers: list[int] = []
        for tick in itertools.count():
            if tick % 20 == 0:
                workers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_child(pid)]
            self.main = max(self.main, anonymous_memory(os.getpid()))
            self.worker = max([self.worker, *map(anonymous_memory, workers)])
            self.busiest = max([self.busiest, *map(cpu_seconds, workers)])
            if self.done.wait(0.01):
                return


def is_child(process: int) -> bool:
    return proc(process, "status").partition("PPid:")[2].split()[:1] == [str(os.getpid())]


def anonymous_memory(process: int) -> int:
    return 1024 * int((proc(process, "status").partition("RssAnon:")[2].split() or ["0"])[0])


def cpu_seconds(process: int) -> float:
    user, system = proc(process, "stat").rpartition(")")[2].split()[11:13] or (0, 0)
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def proc(process: int, file: str) -> str:
    """Return the text of a file of /proc/PID, empty if the process has ended."""
    try:
        return Path(f"/proc/{process}/{file}").read_text()
    except OSError:
        return ""


def all_cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def line(result: dict[str, Any]) -> str:
    return (
        "{case:11} {records:6} records, {workers} workers: {main:.0f} MB in main, {worker:.0f} MB in a worker; "
        "{seconds} s, cpu {cpu_seconds} s, busiest {busiest_cpu_seconds} s, {records_per_second} records/s".format(
            main=result["main_bytes"] / 1e6, worker=result["worker_bytes"] / 1e6, **result
        )
    )


def write(folder: Path, pairs: int, image: Callable[[int], bytes], rows_a_group: int, rows_a_page: int) -> None:
    folder.mkdir()
    for start in range(0, pairs, ROWS_A_FILE):
        rows = range(start, min(start + ROWS_A_FILE, pairs))
        with pq.ParquetWriter(
            folder / f"{start:07}.parquet",
            SCHEMA,
            compression="none",
            use_dictionary=False,
            write_batch_size=rows_a_page,
            data_page_size=1,  # looked at after each batch
        ) as file:
            for first in range(0, len(rows), rows_a_group):
                group = rows[first : first + rows_a_group]
                columns = [[image(0) for _ in group], [image(1) for _ in group], [f"prompt {i}" for i in group]]
                file.write_table(pa.table([*columns, [float(i % 2) for i in group]], SCHEMA), rows_a_group)


def padded(side: int, format: str, size: int) -> Callable[[int], bytes]:
    """Write images of two kinds whose bytes all differ, by data after the end of the image."""
    numbers = itertools.count()
    images = [image(side, format, kind) for kind in range(2)]
    return lambda kind: images[kind] + next(numbers).to_bytes(8) + bytes(max(size - len(images[kind]), 0))


def image(side: int, format: str, seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(file, format)
    return file.getvalue()


if __name__ == "__main__":
    cli.run(main)
