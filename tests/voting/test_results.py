"""Majorities, win rates and agreement, compared with known values."""

import re

import numpy as np
import pytest

from dpo_jax.evaluation.winrate import rate_over_prompts
from dpo_jax.voting.results import agreement, summarise
from dpo_jax.voting.study import Question

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), data of four observers and twelve units.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_agreement_of_the_published_example(level, published):
    rows = [line.split() for line in OBSERVERS.strip().splitlines()]
    counts_UV = np.array([[[row[u] for row in rows].count(str(v)) for v in range(1, 6)] for u in range(12)])
    assert agreement([1, 2, 3, 4, 5], counts_UV, level) == pytest.approx(published, abs=5e-4)


def test_agreement_at_its_ends():
    assert agreement([0, 1], np.array([[3, 0], [0, 3]]), "nominal") == 1
    assert agreement([0, 1], np.array([[3, 0], [2, 0]]), "nominal") is None  # all equal, so alpha is not defined
    assert agreement([0, 1], np.array([[1, 0], [0, 1]]), "nominal") is None  # one vote each
    assert agreement([], np.zeros((0, 0)), "nominal") is None
    rng = np.random.default_rng(0)
    first = rng.binomial(5, 0.5, 5000)
    assert abs(agreement([0, 1], np.stack([first, 5 - first], axis=1), "nominal")) < 0.02


def _add(survey, votes):
    """votes: {(prompt, seed): answers of raters 0, 1, ...}"""
    ids = {(task.prompt, task.seed): id for id, task in survey.store.tasks.items()}
    for (prompt, seed), answers in votes.items():
        for rater, answer in enumerate(answers):
            shown = list(range(len(answer)))
            survey.store.add(f"rater {rater}", ids[f"prompt {prompt}", seed], "preference", answer, shown)


def _summary(survey):
    summary = summarise(survey.store, survey.questions, survey.is_finished)
    return summary.questions[0]


A, B, TIE = (1, 0), (0, 1), (0.5, 0.5)


def test_win_rates_are_of_majorities_and_count_prompts_alike(survey):
    survey = survey(prompts=3, seeds=2, raters=3, ties=True)
    _add(survey, {(0, 0): [A, A, B], (0, 1): [A, B, TIE], (1, 0): [B, B, A], (1, 1): [B], (2, 0): [TIE, TIE, A]})
    result = _summary(survey)
    (row,) = result.comparisons
    assert (row.of, row.over, row.wins, row.losses, row.ties) == ("tuned", "base", 2, 2, 1)
    assert (result.votes, result.judged, result.finished, result.tasks) == (13, 5, 4, 6)
    assert row.rate.rate == pytest.approx((0.25 + 1 + 0) / 3)
    assert result.first_place == 0.5  # of the 10 votes that are not ties; A was shown first
    # the same interval as with equally many comparisons per prompt
    known = rate_over_prompts(np.array([[0, 0.5], [1, 1], [0, 0]]))
    assert (row.rate.low, row.rate.high) == pytest.approx((known.low, known.high))


def test_one_prompt_has_no_interval(survey):
    survey = survey(prompts=1)
    _add(survey, {(0, 0): [A]})
    (row,) = _summary(survey).comparisons
    assert (row.losses, row.rate) == (1, None)


def test_agreement_of_pairs_is_of_what_was_chosen(survey):
    survey = survey(prompts=2, seeds=1)
    _add(survey, {(0, 0): [A, A, A], (1, 0): [B, B, B]})
    assert _summary(survey).alpha == 1


def test_rankings_and_points_compare_folders(survey):
    survey = survey(mode="rank", folders=("a", "b", "c"), prompts=2)
    _add(survey, {(0, 0): [(1, 2, 3), (1, 3, 2)], (1, 0): [(2, 1, 3), (1, 2, 3)]})
    result = _summary(survey)
    assert [(row.of, row.over, row.wins, row.losses, row.ties) for row in result.comparisons] == [
        ("b", "a", 0, 1, 1),
        ("c", "a", 0, 2, 0),
        ("c", "b", 0, 1, 1),
    ]
    assert [(row.name, row.images, row.mean) for row in result.scores] == [("a", 2, 1.75), ("b", 2, 1), ("c", 2, 0.25)]
    assert result.alpha is not None


def test_tags_are_counted_by_folder(survey):
    survey = survey(mode="tag", folders=("a", "b"), prompts=2)
    survey.questions = {"hand": Question("Distorted hand?")}
    for id, task in survey.store.tasks.items():
        for rater in range(4):
            is_tagged = task.images[0].folder == 1 and rater < 3
            survey.store.add(f"rater {rater}", id, "hand", (int(is_tagged),), [0])
    result = _summary(survey)
    assert [(row.name, row.images, row.mean) for row in result.scores] == [("a", 2, 0), ("b", 2, 0.75)]
    assert result.comparisons == []


def test_a_panel_that_errs_finds_the_true_order_over_http(make_folders, serve, tmp_path):
    """Five raters vote at once over HTTP. They see only pixels, and each is wrong a quarter of the time."""
    import concurrent.futures
    import io
    import random

    import httpx2
    from PIL import Image

    names = ["worst", "bad", "good", "best"]
    folders = make_folders(*names, prompts=20)
    images = ",".join(map(str, [folders[k] for k in (2, 0, 3, 1)]))
    server = serve(f"--images={images}", f"--output={tmp_path}/votes.sqlite", "--questions=preference", "--raters=5")

    def quality(browser, id):
        pixels = np.asarray(Image.open(io.BytesIO(browser.get(f"/image/{id}").content)))
        return int(pixels[4, 4, 0]) // 40

    def errs(rater, prompt, two):
        return random.Random(f"{rater} {prompt} {sorted(two)}").random() < 0.25

    def rate(rater):
        with httpx2.Client(base_url=server.url) as browser:
            browser.post("/api/start", json={"name": rater}).raise_for_status()
            state = browser.get("/api/state").json()
            while (now := state["now"]) is not None:
                two = [quality(browser, id) for id in now["images"]]
                first = (two[0] > two[1]) != errs(rater, now["prompt"], two)
                body = {"task": now["task"], "question": now["question"], "answer": [int(first), int(not first)]}
                state = browser.post("/api/vote", json=body).raise_for_status().json()
            return state["answered"]

    raters = [f"rater {k}" for k in range(5)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert list(pool.map(rate, raters)) == [120] * 5
    page = httpx2.get(server.results, follow_redirects=True).text
    rows = re.findall(r"<td>(\w+) over (\w+)</td><td>(\d+)</td><td>(\d+)</td>\s*<td>(\d+)</td>", page)
    won = dict.fromkeys(names, 0)
    for first, second, wins, losses, ties in rows:
        two = names.index(first), names.index(second)
        right = sum(sum(not errs(rater, f"prompt {p}", two) for rater in raters) >= 3 for p in range(20))
        expected = (right, 20 - right) if two[0] > two[1] else (20 - right, right)
        assert (int(wins), int(losses), int(ties)) == (*expected, 0)
        won[first] += int(wins)
        won[second] += int(losses)
    assert len(rows) == 6
    assert sorted(names, key=won.get) == names
