"""Gives damaged files to the commands and counts what became of them.

python -m tests.damage --count=3000 --output=DIR
"""

import argparse
import collections
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from .subjects import SUBJECTS
from .trial import BAD, VERDICTS, Result, Runner


def table(results: list[Result]) -> str:
    """Markdown: a row for each subject."""
    rows = [["subject", "inputs", *VERDICTS]]
    for name in [*dict.fromkeys(result.subject for result in results), "all"]:
        of = [result for result in results if name in (result.subject, "all")]
        counts = collections.Counter(result.verdict for result in of)
        rows.append([name, str(len(of)), *(str(counts[verdict]) for verdict in VERDICTS)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--subjects", default="")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    output = options.output.absolute()
    names = [name for name in SUBJECTS if options.subjects in name]
    runner, results = Runner(output / "work"), []
    pristine = {}
    for name in names:
        pristine[name] = output / "whole" / name
        if not pristine[name].exists():
            pristine[name].mkdir(parents=True)
            SUBJECTS[name][1](pristine[name], runner)
    began, seconds = time.time(), collections.Counter()
    with (output / "results.jsonl").open("a") as log:
        shares = {name: SUBJECTS[name][0].share for name in names}
        for turn in range(options.first, options.first + options.count // sum(shares.values())):
            for name, seed in ((name, turn * share + i) for name, share in shares.items() for i in range(share)):
                since = time.time()
                result = runner.try_one(SUBJECTS[name][0], pristine[name], seed)
                seconds[name] += time.time() - since
                if result is None:
                    continue
                results.append(result)
                log.write(json.dumps({"seed": seed, **vars(result)}) + "\n")
                log.flush()
                if result.verdict in BAD:
                    print(
                        f"{result.verdict}: {name}, seed {seed}: {result.file}: {result.damage}\n    {result.said}",
                        flush=True,
                    )
    shown = table(results)
    (output / "table.md").write_text(shown + "\n")
    print(shown)
    print(f"{time.time() - began:.0f} s; " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    runner.close()


if __name__ == "__main__":
    main()
