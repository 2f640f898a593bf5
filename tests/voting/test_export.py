"""Exports are readable for prepare, and as D3PO's feedback."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.errors import UserError
from dpo_jax.rounds.feedback import read_feedback
from dpo_jax.voting.export import describe, export
from dpo_jax.voting.study import Question

A, B, TIE = (1, 0), (0, 1), (0.5, 0.5)


def _add(survey, rater, answers, question="preference"):
    """answers: in the order of the tasks; None for no answer."""
    for (id, task), answer in zip(survey.store.tasks.items(), answers, strict=True):
        if answer is not None:
            survey.store.add(rater, id, question, answer, list(range(len(task.images))))


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _prepare(path):
    folder = path.parent / "data"
    builder.prepare(SOURCES["jsonl"], [path], folder, workers=0, validation_fraction=0)
    return open_prepared(folder).records.to_pylist(), json.loads((folder / "summary.json").read_text())


def test_prepare_reads_pairs(survey, tmp_path):
    survey = survey(prompts=4)
    _add(survey, "ann", [A, B, TIE, None])
    _add(survey, "bob", [A, B, B, None])
    _add(survey, "eve", [B, B, None, None])
    path = tmp_path / "votes.jsonl"
    assert export(survey.store, path) == (3, 1)
    assert _lines(path)[0] == {
        "prompt": "prompt 0",
        "images": ["base/0-0.png", "tuned/0-0.png"],
        "votes": [2, 1],
        "models": ["base", "tuned"],
    }
    assert [row["votes"] for row in _lines(path)] == [[2, 1], [0, 3], [0.5, 1.5]]
    records, summary = _prepare(path)
    assert (summary["records"], summary["pairs"], summary["quarantined"]) == (3, 3, 0)
    shares = {record["caption"]: (record["models"], record["preference"]) for record in records}
    assert shares["prompt 0"] == (["base", "tuned"], pytest.approx([2 / 3, 1 / 3]))
    assert shares["prompt 1"] == (["tuned", "base"], [1, 0])
    assert shares["prompt 2"] == (["tuned", "base"], pytest.approx([0.75, 0.25]))


def test_one_question_is_exported(survey, tmp_path):
    survey = survey(prompts=2, questions=("preference", "appeal"))
    _add(survey, "ann", [A, A], "appeal")
    _add(survey, "ann", [B, B])
    path = tmp_path / "votes.jsonl"
    export(survey.store, path)
    assert [row["votes"] for row in _lines(path)] == [[0, 1]] * 2
    export(survey.store, path, ["appeal"])
    assert [row["votes"] for row in _lines(path)] == [[1, 0]] * 2
    with pytest.raises(ValueError, match="the answers to one question"):
        export(survey.store, path, ["appeal", "preference"])
    with pytest.raises(ValueError, match="no answers to 'alignment'; it has answers to preference, appeal"):
        export(survey.store, path, ["alignment"])


@pytest.mark.parametrize(
    ("mode", "answers", "scores", "means"),
    [
        ("points", [(5, 1, 3), (4, 2, 2)], [[5, 1, 3], [4, 2, 2]], [4.5, 1.5, 2.5]),
        ("rank", [(1, 3, 2), (2, 3, 1)], [[2, 0, 1], [1, 0, 2]], [1.5, 0, 1.5]),
    ],
)
def test_prepare_and_d3po_read_scores(survey, tmp_path, mode, answers, scores, means):
    survey = survey(mode=mode, folders=("a",), prompts=2, seeds=3)
    for rater, answer in zip(("ann", "bob"), answers, strict=True):
        _add(survey, rater, [answer, None])
    assert export(survey.store, tmp_path / "votes.jsonl") == (1, 1)
    (row,) = _lines(tmp_path / "votes.jsonl")
    assert (row["images"], row["scores"]) == (["a/0-0.png", "a/0-1.png", "a/0-2.png"], scores)
    assert export(survey.store, tmp_path / "feedback.json") == (1, 1)
    assert json.loads((tmp_path / "feedback.json").read_text()) == [means, [None] * 3]
    records, _ = _prepare(tmp_path / "votes.jsonl")
    assert records[0]["preference"] == sorted(records[0]["preference"], reverse=True)
    assert len(records[0]["images"]) == 3


def test_null_in_feedback_is_told_to_users_of_d3pos_script():
    assert "null, which dpo_jax.online reads and D3PO's released script does not" in describe(Path("f.json"), 3, 1)
    assert "null" not in describe(Path("f.json"), 3, 0)
    assert "null" not in describe(Path("f.jsonl"), 3, 1)


def test_tags_become_scores_of_a_prompts_images(survey, tmp_path):
    survey = survey(mode="tag", folders=("a", "b"), prompts=2)
    survey.questions = {"hand": Question("Hand?"), "unsafe": Question("Unsafe?")}
    yes, no = (1,), (0,)
    _add(survey, "ann", [yes, no, no, no], "hand")
    _add(survey, "bob", [yes, no, yes, None], "hand")
    _add(survey, "bob", [no, None, yes, None], "unsafe")
    assert export(survey.store, tmp_path / "feedback.json", ["hand"]) == (2, 0)
    assert json.loads((tmp_path / "feedback.json").read_text()) == [[0, 0.5], [1, 1]]
    export(survey.store, tmp_path / "votes.jsonl")
    rows = _lines(tmp_path / "votes.jsonl")
    assert [row["scores"] for row in rows] == [pytest.approx([1 / 3, 1 / 3]), [1, 1]]
    assert rows[0]["images"] == ["a/0-0.png", "b/0-0.png"]
    assert _prepare(tmp_path / "votes.jsonl")[1]["records"] == 2


def test_tags_of_a_round_are_its_feedback(survey, tmp_path):
    """A round has one folder with K seeds of each prompt."""
    survey = survey(mode="tag", folders=("images",), prompts=2, seeds=3)
    survey.questions = {"distorted hand": Question("Distorted hand?")}
    yes, no = (1,), (0,)
    _add(survey, "ann", [yes, no, no, yes, yes, None], "distorted hand")
    _add(survey, "bob", [yes, no, yes, no, yes, None], "distorted hand")
    export(survey.store, tmp_path / "feedback.json")
    rewards_PK = read_feedback([epath.Path(tmp_path / "feedback.json")], prompts=2, candidates=3)
    np.testing.assert_array_equal(rewards_PK, [[0, 1, 0.5], [0.5, 0, np.nan]])


def test_faults_are_told_and_nothing_is_written(survey, tmp_path):
    survey = survey(prompts=2)
    for path, message in (
        (tmp_path / "votes.jsonl", "has no votes yet"),
        (tmp_path / "votes.txt", "must end in .jsonl"),
        (tmp_path / "votes.json", "pairs have no score per image"),
    ):
        with pytest.raises(ValueError, match=message):
            export(survey.store, path)
    assert not [path for path in tmp_path.rglob("votes.*") if ".sqlite" not in path.name]


@pytest.mark.parametrize("where", ["elsewhere", "base"])
def test_an_export_lies_anywhere_and_prepare_reads_it(survey, tmp_path, where):
    """Images that are not below the export's folder are linked: a data set names no file outside its folder."""
    made = survey(prompts=2)
    _add(made, "ann", [A, B])
    path = tmp_path / where / "votes.jsonl"
    for _ in range(2):  # again: the links are there
        assert export(made.store, path) == (2, 0)
    inside = {"elsewhere": [], "base": ["0-0.png"]}[where]
    links = [f"votes.images/{k}-{name}/0-0.png" for k, name in enumerate(("base", "tuned")) if name != where]
    assert _lines(path)[0]["images"] == inside + links
    records, summary = _prepare(path)
    assert (summary["records"], summary["quarantined"]) == (2, 0)
    assert records[0]["models"] == ["base", "tuned"]


def test_a_link_that_leads_elsewhere_is_laid_anew_and_files_stay(survey, tmp_path):
    made = survey(prompts=1)
    _add(made, "ann", [A])
    path = tmp_path / "elsewhere" / "votes.jsonl"
    folder = path.parent / "votes.images"
    folder.mkdir(parents=True)
    (folder / "0-base").symlink_to(tmp_path / "tuned")
    export(made.store, path)
    assert (folder / "0-base").resolve() == tmp_path / "base"
    (folder / "1-tuned").unlink()
    (folder / "1-tuned").write_text("mine")
    with pytest.raises(UserError, match=r"1-tuned cannot link to .*tuned \(File exists\)\. Write the file to a folder"):
        export(made.store, path)
    assert (folder / "1-tuned").read_text() == "mine"


def test_every_vote_is_in_a_csv_file(survey, tmp_path):
    made = survey(prompts=2, questions=("preference", "appeal"))
    _add(made, "ann", [A, B], "appeal")
    _add(made, "bob", [B, None])
    assert export(made.store, tmp_path / "votes.csv") == (3, 0)
    rows = list(csv.DictReader((tmp_path / "votes.csv").open(newline="")))
    assert [(row["rater"], row["question"], row["model"], row["score"]) for row in rows] == [
        ("ann", "appeal", "base", "1"), ("ann", "appeal", "tuned", "0"),
        ("ann", "appeal", "base", "0"), ("ann", "appeal", "tuned", "1"),
        ("bob", "preference", "base", "0"), ("bob", "preference", "tuned", "1"),
    ]  # fmt: skip
    assert export(made.store, tmp_path / "votes.csv", ["preference"]) == (1, 0)
    assert describe(tmp_path / "votes.csv", 1, 0) == f"Wrote 1 votes to {tmp_path}/votes.csv."
