"""Score the images of a prepared data set with a judge, so that runs can train on its preferences.

  python -m dpo_jax.score --data=data/pickapic --judge=pickscore
  python -m dpo_jax.score --data=data/pickapic --judge=pickscore=models/PickScore_v1 --dtype=bfloat16
  python -m dpo_jax.score --data=data/pickapic --judge=http=http://127.0.0.1:8000/score --name=hpsv3
  python -m dpo_jax.score --data=data/pickapic --judge=mine --scores=mine.jsonl

The last command imports scores that another program wrote, as lines of {"record": index in DATA/records.arrow,
"scores": [one per image, in the record's order]}, or of {"caption": ..., "sha256": of the image file, "score": ...}
(DATA/images.arrow lists the sha256 of every image).

Scores are stored in DATA/scores/, one file per judge, and the votes stay as they are. To train on scores in place of
votes: --config.data.judges="('pickscore',)".
"""

import functools
from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.command_help import section
from dpo_jax.data.store import scores
from dpo_jax.errors import ExistingFileError, UserError
from dpo_jax.rewards import JUDGES, Settings, open_judge

section("Data set and judge")
DATA = flags.DEFINE_string("data", None, "Folder that dpo_jax.prepare wrote.", required=True)
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "Judge: NAME or NAME=SOURCE. With --scores: the name to store the scores under.\n"
    + "\n".join(f"{name}: {judge.help}" for name, judge in JUDGES.items()),
    required=True,
)
NAME = flags.DEFINE_string("name", None, "Name to store the scores under. Default: the judge's name.")

section("Judging")
DTYPE = flags.DEFINE_enum("dtype", Settings.dtype, ["float32", "bfloat16"], "Compute dtype of a judge's network.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per call of the judge.", 1, 2**16)
TIMEOUT = flags.DEFINE_float("timeout", Settings.timeout, "Seconds that an external judge may take per call.", 0.001)

section("Scores from elsewhere")
SCORES = flags.DEFINE_string("scores", None, "JSONL file of scores to import; nothing is judged.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores that are stored under this name.")


def main() -> None:
    file = SCORES.value
    judge = JUDGE.value if file else JUDGE.value.partition("=")[0]
    name = NAME.value or judge
    scores.check_name(name)
    if file is None and judge not in JUDGES:
        raise UserError(
            f"--judge={judge} is not a judge of dpo_jax; its judges are {', '.join(JUDGES)}. Import the scores of "
            "another one with --scores=FILE.jsonl"
        )
    from dpo_jax import locks
    from dpo_jax.data.labels import agreement, judging
    from dpo_jax.data.store.prepared import open_prepared
    from dpo_jax.progress import ProgressBar

    prepared = open_prepared(DATA.value)
    file_there = scores.scores_file(prepared.folder, name)
    with locks.locked(file_there.parent, "python -m dpo_jax.score", f".{name}.lock", what=file_there):
        if file_there.exists() and not OVERWRITE.value:
            raise ExistingFileError(
                f"{prepared.folder} already has scores under the name {name}; replace them with --overwrite, or "
                "choose another --name"
            )
        if file is None:
            opened = open_judge(JUDGE.value, dtype=DTYPE.value, batch_size=BATCH_SIZE.value, timeout=TIMEOUT.value)
            with ProgressBar("images") as bar:
                show = functools.partial(bar.show, "scoring")
                scores_M = judging.score_images(prepared, opened.score, show, batch=BATCH_SIZE.value)
        else:
            with ProgressBar("bytes") as bar:
                scores_M = judging.import_scores(prepared, Path(file), functools.partial(bar.show, "reading"))
        of = scores.candidates(prepared.records["images"])
        summary = agreement.summarise(prepared, name, file or f"dpo_jax.rewards: {JUDGE.value}", scores_M)
        scores.write_scores(prepared.folder, name, summary.origin, scores_M, of, summary.as_json())
        print(f"{summary}\nwritten to {file_there}")


if __name__ == "__main__":
    cli.run(main)
