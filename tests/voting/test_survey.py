"""Which questions raters are asked, in which order, and when a question is finished."""

import itertools

import pytest


def answer_all(survey, rater, choose=lambda now: [1, 0]):
    """Answer everything. Return tasks and questions in the order in which they were asked."""
    asked = []
    while (now := survey.state(rater)["now"]) is not None:
        asked.append((now["task"], now["question"]))
        assert survey.vote(rater, *asked[-1], choose(now))
    return asked


def test_everybody_sees_each_pair_once_in_an_order_of_their_own(survey):
    survey = survey(prompts=20, questions=("preference", "appeal"), raters=9)
    orders = [answer_all(survey, rater) for rater in ("ann", "bob")]
    keys = {(task, question) for task in survey.store.tasks for question in ("preference", "appeal")}
    assert all(set(asked) == keys and len(asked) == 40 for asked in orders)
    assert orders[0] != orders[1]
    assert all(
        a[0] == b[0] for a, b in zip(orders[0][::2], orders[0][1::2], strict=True)
    )  # all questions about a pair, one after the other
    state = survey.state("ann")
    assert (state["answered"], state["total"], state["now"]) == (40, 40, None)


def test_sides_are_random_stored_and_always_the_same(survey):
    survey = survey(prompts=200, raters=9)
    task = next(iter(survey.store.tasks))
    assert survey.shown("ann", task) == survey.shown("ann", task)
    for rater in ("ann", "bob"):
        answer_all(survey, rater, lambda now: [1, 0])  # always the image at the first place
    votes = survey.store.votes()
    assert all(vote.answer == ((1, 0) if vote.shown == (0, 1) else (0, 1)) for vote in votes)
    firsts = [vote.shown[0] for vote in votes]
    assert 150 < sum(firsts) < 250  # 5 standard deviations
    of = {rater: {vote.task: vote.shown for vote in votes if vote.rater == rater} for rater in ("ann", "bob")}
    assert 65 < sum(of["ann"][task] == of["bob"][task] for task in of["ann"]) < 135


def test_progress_counts_answers(survey):
    survey = survey(prompts=3, questions=("preference", "alignment"))
    seen = []
    while (state := survey.state("ann"))["now"]:
        seen.append((state["answered"], state["total"], state["now"]["number"], len(state["next_images"])))
        survey.vote("ann", state["now"]["task"], state["now"]["question"], [0, 1])
    assert seen == [(0, 6, 1, 4), (1, 6, 2, 4), (2, 6, 1, 2), (3, 6, 2, 2), (4, 6, 1, 0), (5, 6, 2, 0)]


def test_the_prompt_is_hidden_where_it_does_not_count(survey):
    survey = survey(questions=("preference", "appeal"))
    first = survey.state("ann")["now"]
    assert first["prompt"].startswith("prompt ")
    survey.vote("ann", first["task"], "preference", [1, 0])
    second = survey.state("ann")["now"]
    assert (second["task"], second["question"], second["prompt"]) == (first["task"], "appeal", "")
    assert second["images"] == first["images"]


def test_a_pair_is_finished_by_its_votes(survey):
    survey = survey(prompts=1, raters=5, ties=True)
    (task,) = survey.store.tasks
    for k in range(5):
        assert survey.state("late")["now"] is not None
        survey.store.add(f"rater {k}", task, "preference", (1, 0), [0, 1])
    assert survey.state("late")["now"] is None
    assert survey.state("late")["total"] == 0
    assert survey.state("rater 0") | {"last": None} == survey.state("none") | {"answered": 1, "total": 1}


@pytest.mark.parametrize(
    ("answers", "finished"),
    [
        ([(1, 0)] * 2, False),
        ([(1, 0)] * 3, True),
        ([(0, 1)] * 3, True),
        ([(1, 0)] * 3 + [(0, 1)], True),
        ([(1, 0)] * 2 + [(0, 1)] * 2, False),
        ([(1, 0)] * 2 + [(0, 1)], False),
        ([(0.5, 0.5)] * 3 + [(1, 0)], False),  # 1 : 1 is still possible
        ([(0.5, 0.5)] * 2 + [(1, 0)] * 2, True),
        ([(0.5, 0.5)] * 5, True),
    ],
)
def test_early_stop_waits_until_the_majority_is_certain(survey, answers, finished):
    survey = survey(prompts=1, raters=5, ties=True, stop_early=True)
    (task,) = survey.store.tasks
    for k, answer in enumerate(answers):
        survey.store.add(f"rater {k}", task, "preference", answer, [0, 1])
    assert (survey.state("late")["now"] is None) == finished


def test_stopping_early_never_changes_a_majority(survey):
    survey = survey(prompts=1, raters=5, ties=True, stop_early=True)
    answers = (1, 0), (0, 1), (0.5, 0.5)

    def majority(votes):
        lead = sum(a - b for a, b in votes)
        return (lead > 0) - (lead < 0)

    def tally(votes):
        return {answer: votes.count(answer) for answer in answers}

    for votes in itertools.product(answers, repeat=5):
        stop = next(n for n in range(6) if survey.is_finished(tally(votes[:n])))
        assert majority(votes[:stop]) == majority(votes)


def test_undo_asks_again_even_what_others_finished(survey):
    survey = survey(prompts=2, raters=1)
    first = survey.state("ann")["now"]
    survey.vote("ann", first["task"], "preference", [1, 0])
    last = survey.state("ann")["last"]
    assert last == {"task": first["task"], "question": "preference"}
    survey.store.add("bob", first["task"], "preference", (1, 0), [0, 1])
    state = survey.undo("ann", **last)
    assert state["now"] == first
    assert (state["answered"], state["total"], state["last"]) == (0, 2, None)
    assert survey.vote("ann", first["task"], "preference", [0, 1])
    (other,) = set(survey.store.tasks) - {first["task"]}
    assert survey.undo("ann", other, "preference")["answered"] == 1  # not answered, so nothing changes
    with pytest.raises(ValueError, match="no such task"):
        survey.undo("ann", first["task"], "appeal")


def test_what_another_run_asked_is_left_alone(survey):
    survey = survey(prompts=2)
    for task in survey.store.tasks:
        survey.store.add("ann", task, "appeal", (1, 0), [0, 1])
    state = survey.state("ann")
    assert (state["answered"], state["total"], state["last"]) == (0, 2, None)


def test_voting_twice_is_voting_once(survey):
    survey = survey()
    task = next(iter(survey.store.tasks))
    assert survey.vote("ann", task, "preference", [1, 0])
    assert survey.vote("ann", task, "preference", [1, 0])
    assert not survey.vote("ann", task, "preference", [0, 1])
    assert len(survey.store.votes()) == 1


def test_what_is_no_answer_is_refused(survey):
    survey = survey()
    task = next(iter(survey.store.tasks))
    for wrong in ([0.5, 0.5], [1], [1, 0, 0], [1, 1], [], [float("nan"), 0]):
        with pytest.raises(ValueError, match="answer"):
            survey.vote("ann", task, "preference", wrong)
    for where in (("gone", "preference"), (task, "appeal")):
        with pytest.raises(ValueError, match="no such task or question"):
            survey.vote("ann", *where, [1, 0])


def test_ranks_go_back_to_their_images(survey):
    survey = survey(mode="rank", folders=("a", "b", "c"), prompts=30)
    for task in survey.store.tasks:
        shown = survey.shown("ann", task)
        survey.vote("ann", task, "preference", [folder + 1 for folder in shown])  # a best, then b, then c
    assert {vote.answer for vote in survey.store.votes()} == {(1, 2, 3)}
    assert len({vote.shown for vote in survey.store.votes()}) == 6
