"""The pages and the API, in this process."""

import csv
import io
import json
import re
import sqlite3

import pytest

from dpo_jax.voting.access import MAX_BODY

from .conftest import client, owner


def test_a_rater_starts_votes_undoes_and_leaves(survey):
    browser = client(survey(prompts=2))
    assert "Your name" in browser.get("/").text
    assert browser.get("/api/state").status_code == 401
    browser.post("/api/start", json={"name": "Zoë 李"})
    assert "Zoë 李" in browser.get("/").text
    state = browser.get("/api/state").json()
    now = state["now"]
    assert (state["answered"], state["total"], state["last"]) == (0, 2, None)
    vote = {"task": now["task"], "question": now["question"], "answer": [1.0, 0]}
    after = browser.post("/api/vote", json=vote).json()
    assert (after["answered"], after["last"]) == (1, {"task": now["task"], "question": "preference"})
    assert browser.post("/api/vote", json=vote).json() == after  # sent twice
    assert browser.post("/api/vote", json=vote | {"answer": [0, 1]}).status_code == 409
    assert browser.post("/api/undo", json=after["last"]).json()["now"] == now
    browser.post("/api/leave", json={})
    assert browser.get("/api/state").status_code == 401


def test_raters_do_not_see_each_other(survey):
    made = survey(prompts=2)
    ann, bob = client(made, "ann"), client(made, "bob")
    now = ann.get("/api/state").json()["now"]
    ann.post("/api/vote", json={"task": now["task"], "question": "preference", "answer": [0, 1]})
    assert bob.get("/api/state").json()["answered"] == 0
    assert {vote.rater for vote in made.store.votes()} == {"ann"}


def _static(browser):
    names = re.findall(r"/static/[\w.]+", browser.get("/").text)
    assert len(names) == 3
    return [browser.get(name).raise_for_status().text for name in names]


def test_pages_load_nothing_from_elsewhere(survey):
    made = survey()
    browser = client(made)
    texts = [browser.get("/").text, owner(made).get("/results").text, *_static(browser)]
    browser.post("/api/start", json={"name": "ann"})
    texts += [browser.get("/").text, *_static(browser)]
    links = {link for text in texts for link in re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)}
    assert links == {"http://www.w3.org"}  # the icon's XML namespace
    assert not [text for text in texts if "<style" in text or "style=" in text or "onclick=" in text]


def test_security_headers_on_every_reply(survey):
    browser = client(survey())
    replies = [browser.get(path) for path in ("/", "/results", "/static/vote.js", "/gone", "/api/state")]
    replies.append(browser.post("/api/start", json={}))
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
    cookie = browser.post("/api/start", json={"name": "ann"}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie


def test_a_token_is_shown_once_and_kept(survey):
    made = survey()
    for path in ("/", "/results", "/api/state", "/static/vote.js", "/image/x", "/gone"):
        for query in ("", "?token=", "?token=wrong-token", "?token=%ff%00é"):
            assert client(made, token="right-token").get(path + query).status_code == 403
    browser = client(made, token="right-token")
    reply = browser.get("/?rater=x&token=right-token", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, "/?rater=x")
    assert "Your name" in browser.get("/").text
    reply = browser.get("//evil.example?token=right-token", follow_redirects=False)
    assert reply.headers["location"] == "/"  # never to another site
    stranger = client(made, token="right-token")
    stranger.cookies.set(f"token-{made.store.opaque('cookie')[:8]}", "right-tokem")
    assert stranger.get("/").status_code == 403


def test_without_a_token_only_this_machine_is_served(survey):
    browser = client(survey())
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert browser.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.0.7:8000", "", "[", "localhost.evil.example"):
        assert browser.get("/", headers={"Host": host}).status_code == 403


def test_only_our_own_pages_may_post(survey):
    browser, name = client(survey()), {"name": "ann", "key": "mine"}
    assert browser.post("/api/start", json=name, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000", ""):
        assert browser.post("/api/start", json=name, headers={"Origin": origin}).status_code == 403
    assert browser.post("/api/start", data=name).status_code == 415  # forms of other sites can send this
    assert browser.post("/api/start", content=json.dumps(name)).status_code == 415


def test_too_much_is_refused(survey):
    browser = client(survey())
    kind = {"Content-Type": "application/json"}
    longest = b'{"name": "ann"' + b" " * (MAX_BODY - 15) + b"}"
    assert browser.post("/api/start", content=longest, headers=kind).status_code == 200
    assert browser.post("/api/start", content=longest + b" ", headers=kind).status_code == 413
    chunks = iter([b" " * 1000] * 100)  # without a Content-Length
    assert browser.post("/api/start", content=chunks, headers=kind).status_code == 413


def test_a_full_disk_is_told_and_nothing_is_lost(survey):
    made = survey(prompts=40, questions=("preference", "appeal", "alignment"))
    browser = client(made, "ann")

    def limit(pages):
        made.store._connection.execute(f"PRAGMA max_page_count = {pages}")

    def vote():
        now = browser.get("/api/state").json()["now"]
        body = {"task": now["task"], "question": now["question"], "answer": [1, 0]}
        return browser.post("/api/vote", json=body).status_code

    limit(made.store._connection.execute("PRAGMA page_count").fetchone()[0])
    codes = [vote() for _ in range(100)]
    assert set(codes) == {200, 503}
    assert len(made.store.votes()) == codes.count(200)
    limit(10**6)
    assert vote() == 200
    assert len(made.store.votes()) == codes.count(200) + 1


def test_a_file_that_is_damaged_meanwhile_takes_no_votes(survey):
    made = survey()
    browser = client(made, "ann")
    with sqlite3.connect(made.store.path) as other:
        other.execute("UPDATE tasks SET prompt = 'another'")
    other.close()
    for reply in (browser.get("/api/state"), browser.post("/api/start", json={"name": "bob"})):
        assert reply.status_code == 503
        assert "is damaged" in reply.text


@pytest.mark.parametrize("mode", ["pairs", "rank", "points"])
def test_results_are_shown_from_the_first_vote_on(survey, mode):
    made = survey(mode=mode, folders=("base", "tuned"), ties=True)
    browser, other = client(made, "ann <b>"), owner(made)
    assert "0 votes by 0 raters on 0 of 3" in other.get("/results").text
    while (now := browser.get("/api/state").json()["now"]) is not None:
        body = {"task": now["task"], "question": "preference", "answer": [1, 2] if mode != "pairs" else [1, 0]}
        browser.post("/api/vote", json=body).raise_for_status()
    page = " ".join(other.get("/results").text.split())
    assert f"3 votes by 1 rater on 3 of 3 {made.store.rules.unit}" in page
    assert "base over tuned" not in page
    assert "<td>tuned over base</td>" in page
    assert "ann &lt;b&gt;" in page


def test_the_results_of_one_rater_count_and_are_marked(survey):
    made = survey(questions=("preference", "alignment"), raters=5)
    browser, other = client(made, "ann"), owner(made)
    for _ in range(2):
        while (now := browser.get("/api/state").json()["now"]) is not None:
            images = [made.find_image("ann" if browser is not other else "bob", id)[1] for id in now["images"]]
            body = {"task": now["task"], "question": now["question"], "answer": [float(k == 1) for k in images]}
            browser.post("/api/vote", json=body).raise_for_status()
        page = " ".join(other.get("/results").text.split())
        if browser is other:
            break
        assert "<strong>One rater:</strong> everything below is what ann said (6 votes)." in page
        assert "tuned is clearly preferred over base by one rater: win rate 100.0%" in page
        assert page.count('<span class="badge">one rater</span>') == 2
        assert "majority" not in page
        assert "finished" not in page
        browser = other
        browser.post("/api/start", json={"name": "bob"}).raise_for_status()
    assert "one rater" not in page.lower()
    assert "tuned is clearly preferred over base by 2 raters: win rate 100.0%" in page
    assert "3 of 3 comparisons. 0 of them have all 5 votes." in page


def test_results_are_refreshed_and_downloaded(survey):
    made = survey(prompts=2)
    browser, other = client(made, '=HYPERLINK("http://evil.example")'), owner(made)
    now = browser.get("/api/state").json()["now"]
    images = [made.find_image('=HYPERLINK("http://evil.example")', id)[1] for id in now["images"]]
    body = {"task": now["task"], "question": "preference", "answer": [float(k == 0) for k in images]}
    browser.post("/api/vote", json=body).raise_for_status()
    links = re.findall(r'<a class="[^"]*" href="([^"]+)"', other.get("/results").text)
    assert links == ["/results", "/results.json", "/votes.csv", "/"]
    summary = other.get("/results.json").raise_for_status()
    assert summary.headers["content-disposition"] == 'attachment; filename="results.json"'
    (question,) = summary.json()["questions"]
    assert (question["question"], question["votes"], question["raters"]) == ("preference", 1, 1)
    (row,) = question["win_rates"]
    assert row == {"of": "tuned", "over": "base", "wins": 0, "losses": 1, "ties": 0, "comparisons": 1}
    reply = other.get("/votes.csv").raise_for_status()
    assert reply.headers["content-disposition"] == 'attachment; filename="votes.csv"'
    rows = list(csv.DictReader(io.StringIO(reply.text)))
    assert [(row["model"], row["score"], row["place"]) for row in rows] == [
        ("base", "1", str(images.index(0) + 1)), ("tuned", "0", str(images.index(1) + 1))
    ]  # fmt: skip
    assert {row["rater"] for row in rows} == {'\'=HYPERLINK("http://evil.example")'}  # text, not a formula
    for path in ("/results.json", "/votes.csv"):
        assert browser.get(path).status_code == 403


def test_the_results_are_linked_for_the_person_who_may_see_them(survey):
    made = survey()
    rater, other = client(made, "ann"), owner(made)
    assert 'href="/results"' in other.get("/").text  # the start page
    other.post("/api/start", json={"name": "bob"}).raise_for_status()
    assert 'id="results" class="button quiet" href="/results"' in other.get("/").text
    assert "/results" not in rater.get("/").text
