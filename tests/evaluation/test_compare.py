"""Images are matched by prompt and seed, and compared."""

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluation.compare import compare, match
from dpo_jax.sampling.image_folder import Entry, write_list
from dpo_jax.sampling.prompts import Prompt


def folder_of(path, entries):
    path.mkdir()
    for entry in entries:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path / entry.image)
    write_list(path, entries)
    return path


@pytest.fixture
def folders(tmp_path):
    """Two folders; the second has another order, one more image of "a", no image of "c", and other seeds."""
    one = [
        Entry("a0.png", "a", 0, "x"),
        Entry("a1.png", "a", 1, "x"),
        Entry("b.png", "b", 0, "x"),
        Entry("c.png", "c", 0),
    ]
    other = [Entry("B.png", "b", 7), Entry("A9.png", "a", 9), Entry("A7.png", "a", 7), Entry("A8.png", "a", 8)]
    return {"one": folder_of(tmp_path / "one", one), "other": folder_of(tmp_path / "other", other)}


def test_images_are_matched_by_prompt_and_in_the_order_of_seeds(folders):
    contest = match(folders)
    assert [path.name for path in contest.images["one"]] == ["a0.png", "a1.png", "b.png"]
    assert [path.name for path in contest.images["other"]] == ["A7.png", "A8.png", "B.png"]
    assert contest.captions == ["a", "a", "b"]
    assert contest.left_out == 1
    assert contest.categories == ["x"]


def test_a_list_of_prompts_chooses_and_says_the_categories(folders):
    contest = match(folders, [Prompt("b", "y"), Prompt("a"), Prompt("z")])
    assert contest.captions == ["b", "a", "a"]
    assert contest.categories == ["y"]
    assert contest.left_out == 1
    with pytest.raises(ValueError, match="no prompt in common"):
        match(folders, [Prompt("c")])
    with pytest.raises(ValueError, match=r"only one prompt in common \('a'\) among the 1 of --prompts; confidence"):
        match(folders, [Prompt("a")])


def test_figures(folders):
    contest = match(folders)
    scores = {"judge": {"one": np.array([1.0, 2, 3]), "other": np.array([1.0, 3, 2])}}
    features = {"one": np.array([[0.0], [1], [5]]), "other": np.array([[0.0], [3], [5]])}
    result = compare(contest, scores, features)
    assert (result["prompts"], result["images"], result["prompts_left_out"]) == (2, 3, 1)
    (row,) = result["judges"]["judge"]["win_rates"]
    assert (row["of"], row["over"], row["ties"], row["comparisons"]) == ("other", "one", 1, 3)
    assert row["rate"] == pytest.approx((0.75 + 0) / 2)  # "a": a tie and a win; "b": lost
    assert row["categories"] == {"x": {key: row[key] for key in ("rate", "low", "high", "ties", "comparisons")}}
    of_one = result["judges"]["judge"]["models"]["one"]
    assert (of_one["mean"], of_one["median"]) == (pytest.approx((1.5 + 3) / 2), 2)
    assert result["models"]["one"] == {"diversity": 1.0, "distance_to_first": 0.0}
    assert result["models"]["other"]["diversity"] == 3.0
    assert result["models"]["other"]["distance_to_first"] > 0


def test_scores_by_category(tmp_path):
    """The mean of the categories has one weight per category; the mean over prompts one per prompt."""
    prompts = [Prompt(text, category) for text, category in zip("abcdefg", "xxxyyz ", strict=True)]
    entries = [Entry(f"{prompt.text}.png", prompt.text, 0, prompt.category.strip()) for prompt in prompts]
    contest = match({name: folder_of(tmp_path / name, entries) for name in ("one", "other")})
    scores_N = np.array([1.0, 1, 0, 0, 0, 1, 1])
    features = {name: np.eye(7) for name in contest.images}
    result = compare(contest, {"geneval": {"one": scores_N, "other": 1 - scores_N}}, features)
    of_one = result["judges"]["geneval"]["models"]["one"]
    assert of_one["mean"] == pytest.approx(4 / 7)
    means = {category: of_category["mean"] for category, of_category in of_one["categories"].items()}
    assert means == {"x": pytest.approx(2 / 3), "y": 0}  # z has one prompt, too few for an interval
    assert of_one["mean_of_categories"] == pytest.approx(1 / 3)
    assert 0 <= of_one["categories"]["x"]["low"] < 2 / 3 < of_one["categories"]["x"]["high"] <= 1


def test_every_later_model_is_compared_with_every_earlier_one(folders):
    contest = match(folders | {"third": folders["one"]})
    scores = {"judge": {name: np.full(3, float(i)) for i, name in enumerate(contest.images)}}
    features = {name: np.eye(3) for name in contest.images}
    rows = compare(contest, scores, features)["judges"]["judge"]["win_rates"]
    assert [(row["of"], row["over"], row["rate"]) for row in rows] == [
        ("other", "one", 1),
        ("third", "one", 1),
        ("third", "other", 1),
    ]
