"""Lets a judge look at the images of a prepared data set, so that runs can train on its preferences.

  python -m dpo_jax.score --data=data/pickapic --judge=pickscore
  python -m dpo_jax.score --data=data/pickapic --judge=pickscore=models/PickScore_v1 --dtype=bfloat16
  python -m dpo_jax.score --data=data/pickapic --judge=http=http://127.0.0.1:8000/score --name=hpsv3
  python -m dpo_jax.score --data=data/pickapic --judge=mine --scores=mine.jsonl

The last takes scores that an outside judge wrote, in lines of {"record": row of DATA/records.arrow, "scores": [of its
images in their order]}, or of {"caption": ..., "sha256": of the image file, "score": ...} (DATA/images.arrow lists the
sha256 of all images). Scores are stored in DATA/scores/, beside the votes, which stay as they are; so there can be
several judges. To train on them: --config.data.judges="('pickscore',)".
"""

import functools
from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.data.store import scores
from dpo_jax.errors import ExistingFileError, UserError
from dpo_jax.rewards import JUDGES, Settings, open_judge

DATA = flags.DEFINE_string("data", None, "Folder that dpo_jax.prepare wrote.", required=True)
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "Who judges, NAME or NAME=what it is opened from; with --scores the name to keep them under.\n"
    + "\n".join(f"{name}: {judge.help}" for name, judge in JUDGES.items()),
    required=True,
)
NAME = flags.DEFINE_string("name", None, "The name to keep the scores under; by default the judge's.")
DTYPE = flags.DEFINE_enum("dtype", Settings.dtype, ["float32", "bfloat16"], "What a judge's network computes in.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images shown to the judge at a time.", 1, 2**16)
TIMEOUT = flags.DEFINE_float("timeout", Settings.timeout, "Seconds that an outside judge has for each time.", 0.001)
SCORES = flags.DEFINE_string("scores", None, "JSONL file that an outside judge wrote.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores that there are by this judge.")


def main() -> None:
    file = SCORES.value
    judge = JUDGE.value if file else JUDGE.value.partition("=")[0]
    name = NAME.value or judge
    scores.check_name(name)
    if file is None and judge not in JUDGES:
        raise UserError(
            f"--judge={judge}: the judges that come with dpo_jax are {', '.join(JUDGES)}; give scores of another one "
            "by --scores=FILE.jsonl"
        )
    from dpo_jax import locks
    from dpo_jax.data.labels import agreement, judging
    from dpo_jax.data.store.prepared import open_prepared
    from dpo_jax.progress import ProgressBar

    prepared = open_prepared(DATA.value)
    file_there = scores.scores_file(prepared.folder, name)
    with locks.locked(file_there.parent, "python -m dpo_jax.score", f".{name}.lock", what=file_there):
        if file_there.exists() and not OVERWRITE.value:
            raise ExistingFileError(f"{prepared.folder} has scores by {name} already; replace them by --overwrite")
        if file is None:
            scorer = open_judge(JUDGE.value, dtype=DTYPE.value, batch_size=BATCH_SIZE.value, timeout=TIMEOUT.value)
            with ProgressBar("images") as bar:
                show = functools.partial(bar.show, "scoring")
                scores_M = judging.score_images(prepared, scorer.score, show, batch=BATCH_SIZE.value)
        else:
            with ProgressBar("bytes") as bar:
                scores_M = judging.import_scores(prepared, Path(file), functools.partial(bar.show, "reading"))
        of = scores.candidates(prepared.records["images"])
        summary = agreement.summarise(prepared, name, file or f"dpo_jax.rewards: {JUDGE.value}", scores_M)
        scores.write_scores(prepared.folder, name, summary.origin, scores_M, of, summary.as_json())
        print(f"{summary}\nwritten to {file_there}")


if __name__ == "__main__":
    cli.run(main)
