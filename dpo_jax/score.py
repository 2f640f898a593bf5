"""Lets a judge look at the images of a prepared data set, so that runs can train on its preferences.

  python -m dpo_jax.score --data=data/pickapic --judge=shapes
  python -m dpo_jax.score --data=data/pickapic --judge=mine --scores=mine.jsonl

The second takes scores that an outside judge wrote, in lines of {"record": row of DATA/records.arrow, "scores": [of its
images in their order]}, or of {"caption": ..., "sha256": of the image file, "score": ...} (DATA/images.arrow lists the
sha256 of all images). Scores are stored in DATA/scores/, beside the votes, which stay as they are; so there can be
several judges. To train on them: --config.data.judges="('shapes',)".
"""

from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.data import scores
from dpo_jax.rewards import JUDGES

DATA = flags.DEFINE_string("data", None, "Folder that dpo_jax.prepare wrote.", required=True)
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "Who judges, or with --scores the name to keep them under.\n"
    + "\n".join(f"{name}: {judge.help}" for name, judge in JUDGES.items()),
    required=True,
)
SCORES = flags.DEFINE_string("scores", None, "JSONL file that an outside judge wrote.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores that there are by this judge.")


def main() -> None:
    judge, file = JUDGE.value, SCORES.value
    scores.check_name(judge)
    if file is None and judge not in JUDGES:
        raise ValueError(
            f"--judge={judge}: the judges that come with dpo_jax are {', '.join(JUDGES)}; give scores of another one "
            "by --scores=FILE.jsonl"
        )
    from dpo_jax.data import agreement, judging  # after the flags are checked: importing TFDS takes a second
    from dpo_jax.data.prepared import open_prepared
    from dpo_jax.progress import ProgressBar

    prepared = open_prepared(DATA.value)
    if scores.scores_file(prepared.folder, judge).exists() and not OVERWRITE.value:
        raise FileExistsError(f"{prepared.folder} has scores by {judge} already; replace them by --overwrite")
    with ProgressBar("images" if file is None else "bytes") as bar:
        if file is None:
            scores_M = judging.score_images(prepared, JUDGES[judge].score, lambda *done: bar.show("scoring", *done))
        else:
            scores_M = judging.import_scores(prepared, Path(file), lambda *done: bar.show("reading", *done))
    of = scores.candidates(prepared.records["images"])
    summary = agreement.summarise(prepared, judge, file or "dpo_jax.rewards", scores_M)
    scores.write_scores(prepared.folder, judge, summary.origin, scores_M, of, summary.as_json())
    print(f"{summary}\nwritten to {scores.scores_file(prepared.folder, judge)}")


if __name__ == "__main__":
    cli.run(main)
