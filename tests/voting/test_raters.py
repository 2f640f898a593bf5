"""A name belongs to one person, and nobody else can vote or undo under it."""

import html
import re
from urllib.parse import parse_qs, quote

import pytest

from dpo_jax.voting.raters import Raters, clean_name
from dpo_jax.voting.store import MAX_UNDOS

from .conftest import client


def _link(browser):
    return html.unescape(re.search(r'id="link" readonly value="([^"]+)"', browser.get("/").text)[1])


def _card(browser):
    return parse_qs(_link(browser).partition("?")[2])["rater"][0]


def _vote(browser, answer=(1, 0)):
    now = browser.get("/api/state").json()["now"]
    key = {"task": now["task"], "question": now["question"]}
    browser.post("/api/vote", json=key | {"answer": list(answer)}).raise_for_status()
    return key


@pytest.mark.parametrize("name", ["ann", "Ann", " ANN ", "\uff41nn", "ann\ufe0f", "a\u034fnn"])
def test_typing_a_name_is_not_being_that_person(survey, name):
    made = survey()
    ann, other = client(made, "ann"), client(made)
    key = _vote(ann)
    reply = other.post("/api/start", json={"name": name})
    assert reply.status_code == 409
    assert reply.text.startswith("This name is taken. If it is yours, open your own link, or ask")
    assert "set-cookie" not in reply.headers
    assert other.get("/api/state").status_code == 401
    assert other.post("/api/undo", json=key).status_code == 401
    assert len(made.store.votes()) == 1
    assert "ann" not in other.get("/").text.replace("planned", "")


@pytest.mark.parametrize("shown", ["ann", "ann.", "ann.{}x", "bob.{}", ".{}", "{}", "ann.é", "%00.{}", "a" * 9999])
def test_a_forged_card_is_nobodys(survey, shown):
    made = survey()
    card = _card(client(made, "ann"))
    forged = shown.format(card.rpartition(".")[2])
    assert Raters(made.store).holder(card) == "ann"
    assert Raters(made.store).holder(forged) == ""
    browser = client(made)
    assert browser.get(f"/?rater={quote(forged)}").status_code == 403
    assert browser.get("/api/state").status_code == 401


def test_a_rater_comes_back_by_a_link_of_their_own(survey):
    made = survey(prompts=2)
    for name in ("Zoë 李", "J. & D. <b>"):
        here, there = client(made, token="right-token"), client(made, token="right-token")
        here.get("/?token=right-token")
        here.post("/api/start", json={"name": name}).raise_for_status()
        _vote(here)
        assert str(there.get(_link(here)).raise_for_status().url) == "http://127.0.0.1:8000/"
        assert there.get("/api/state").json()["answered"] == 1
    assert {vote.rater for vote in made.store.votes()} == {"Zoë 李", "J. & D. <b>"}
    there.post("/api/leave", json={})
    assert there.get("/api/state").status_code == 401


def test_a_lost_reply_does_not_lose_the_name(survey):
    made = survey()
    browser = client(made)
    body = {"name": "ann", "key": "made by the page"}
    first = browser.post("/api/start", json=body)
    assert client(made).post("/api/start", json=body).headers["set-cookie"] == first.headers["set-cookie"]
    for key in ("another", ""):
        assert client(made).post("/api/start", json=body | {"key": key}).status_code == 409
    assert client(made).post("/api/start", json=body | {"key": 3}).status_code == 400


def test_only_who_was_invited_votes(survey):
    made = survey()
    raters = Raters(made.store)
    cards = {name: raters.invite(name) for name in ("ann", "bob", "ann")}
    closed = client(made, is_open=False)
    assert "Only invited people can vote here" in closed.get("/").text
    assert closed.post("/api/start", json={"name": "eve"}).status_code == 403
    assert closed.get("/api/state").status_code == 401
    closed.get(f"/?rater={cards['bob']}").raise_for_status()
    _vote(closed)
    assert [vote.rater for vote in made.store.votes()] == ["bob"]
    assert client(made).post("/api/start", json={"name": "Bob"}).status_code == 409  # open to everybody again
    assert raters.invite("BOB") == cards["bob"]  # for a rater who lost their link


def test_names_of_others_are_not_shown(survey):
    made = survey()
    for name in ("secret one", "secret two"):
        _vote(client(made, name))
    browser = client(made)
    texts = [browser.get("/").text]
    browser.post("/api/start", json={"name": "ann"})
    texts += [browser.get(path).text for path in ("/", "/api/state", "/results")]
    assert not [text for text in texts if "secret" in text]


def test_only_the_latest_answer_can_be_taken_back_and_not_for_ever(survey):
    made = survey(prompts=3)
    browser = client(made, "ann")
    keys = [_vote(browser) for _ in range(2)]
    reply = browser.post("/api/undo", json=keys[0])
    assert (reply.status_code, reply.text) == (400, "Not stored: you can only undo your latest answer.")
    for _ in range(MAX_UNDOS):
        assert browser.post("/api/undo", json=keys[1]).json()["now"]["task"] == keys[1]["task"]
        browser.post("/api/vote", json=keys[1] | {"answer": [0, 1]}).raise_for_status()
    reply = browser.post("/api/undo", json=keys[1])
    assert (reply.status_code, "it is final now" in reply.text) == (400, True)
    assert len(made.store.votes()) == 2


def test_names():
    assert clean_name("  Ann \t Bo ") == "Ann Bo"
    assert clean_name("Zoë 李") == "Zoë 李"
    for wrong in ("", " \n", "a" * 65, "a\0b", "\ud800", "\u202e", 3, None, ["a"]):
        assert clean_name(wrong) == ""
