"""The command `python -m dpo_jax.vote`."""

import json
import socket
import subprocess
import sys

import httpx2
import pytest

from dpo_jax.locks import locked
from dpo_jax.voting.store import open_votes


def vote(*arguments):
    command = [sys.executable, "-m", "dpo_jax.vote", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _listed(folders):
    return f"--images={','.join(map(str, folders))}"


def test_votes_are_served_kept_and_exported(make_folders, serve, tmp_path):
    folders = make_folders("base", "tuned")
    arguments = _listed(folders), f"--output={tmp_path}/votes.sqlite", "--questions=preference"
    for life in range(3):  # the same command continues
        server = serve(*arguments)
        assert server.url.startswith("http://127.0.0.1:")
        assert "token" not in server.url
        with httpx2.Client(base_url=server.url) as browser:
            browser.post("/api/start", json={"name": "ann", "key": "her browser's"}).raise_for_status()
            state = browser.get("/api/state").json()
            assert state["answered"] == life
            key = {name: state["now"][name] for name in ("task", "question")}
            browser.post("/api/vote", json=key | {"answer": [1, 0]}).raise_for_status()
        server.process.send_signal(2)
        out, err = server.process.communicate(timeout=30)
        assert f"Stopped with {life + 1} votes" in out
        assert (err, server.process.returncode) == ("", 0)
    done = vote(f"--output={tmp_path}/votes.sqlite", f"--export={tmp_path}/votes.jsonl")
    written = f"Wrote 3 prompts with votes to {tmp_path}/votes.jsonl"
    assert done.stdout == f"{written}; left out 0 that lack votes.\n"
    prepare = "dpo_jax.prepare", "--source=jsonl", f"--input={tmp_path}/votes.jsonl", f"--output={tmp_path}/data"
    read = subprocess.run([sys.executable, "-m", *prepare, "--workers=0"], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    summary = json.loads((tmp_path / "data" / "summary.json").read_text())
    assert (summary["records"], summary["pairs"], summary["quarantined"]) == (3, 3, 0)


def test_of_two_pages_on_the_same_votes_the_second_is_refused(make_folders, tmp_path):
    arguments = _listed(make_folders("base", "tuned")), f"--output={tmp_path}/votes.sqlite", "--port=0"
    with locked(tmp_path, "another command", ".votes.sqlite.lock"):
        done = vote(*arguments)
    assert done.returncode == 1
    assert f"error: {tmp_path}/votes.sqlite is in use by another command (process " in done.stderr


def test_other_machines_need_a_token(make_folders, serve, tmp_path):
    server = serve(_listed(make_folders("base", "tuned")), f"--output={tmp_path}/votes.sqlite", "--host=0.0.0.0")
    token = server.url.partition("?token=")[2]
    assert len(token) >= 20
    here = f"http://127.0.0.1:{server.port}"
    with httpx2.Client(base_url=here, follow_redirects=True) as browser:
        assert browser.get("/").status_code == 403
        assert "Your name" in browser.get(f"/?token={token}").text
        assert browser.get("/results").status_code == 403
        assert browser.get(f"/results?token={token}").status_code == 403
        own = server.results.partition("?")[2]
        assert "Results so far" in browser.get(f"/results?{own}").text
    assert httpx2.get(f"{here}/results?{own}x").status_code == 403


def test_raters_are_invited_by_links_of_their_own(make_folders, serve, tmp_path):
    flags = f"--output={tmp_path}/votes.sqlite", "--invite=ann,Zoë 李", "--questions=preference"
    server = serve(_listed(make_folders("base", "tuned")), *flags, "--token=right-token")
    links = dict(line.strip().split(": ", 1) for line in server.said if ": http" in line and "vote" not in line)
    assert list(links) == ["ann", "Zoë 李"]
    for link in links.values():
        with httpx2.Client(follow_redirects=True) as browser:
            page = browser.get(link).raise_for_status()
            assert page.url.path == "/"
            state = browser.get(page.url.join("/api/state")).json()
            key = {name: state["now"][name] for name in ("task", "question")}
            browser.post(page.url.join("/api/vote"), json=key | {"answer": [1, 0]}).raise_for_status()
    with httpx2.Client(base_url=server.url.partition("?")[0], follow_redirects=True) as browser:
        assert "Only invited people" in browser.get("/?token=right-token").text
        assert browser.post("/api/start", json={"name": "eve"}).status_code == 403
    server.stop()
    with open_votes(tmp_path / "votes.sqlite") as store:
        assert {vote.rater for vote in store.votes()} == set(links)


def test_a_file_of_other_images_is_refused(make_folders, serve, tmp_path):
    base, tuned, other = make_folders("base", "tuned", "other")
    serve(_listed([base, tuned]), f"--output={tmp_path}/votes.sqlite").stop()
    done = vote(_listed([base, other]), f"--output={tmp_path}/votes.sqlite", "--port=0")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/votes.sqlite has votes on other images, or on the same folders in another order; "
        "set another --output\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images=gone,base"], "no folder of images at gone"),
        (["--images=base"], "compares two folders or more, but --images names 1"),
        (["--images=base,base/../base"], "names a folder twice"),
        (["--images=base,empty"], "empty has no images"),
        (["--images=base,others"], "base and others have no image of the same prompt and seed"),
        (
            ["--images=base,tuned", "--questions=beauty"],
            "--questions=beauty is not a question; choose from preference, appeal",
        ),
        (["--images=base,tuned", "--tags=hand"], "--mode=tag and --tags only work together"),
        (["--images=base,tuned", "--mode=tag"], "--mode=tag and --tags only work together"),
        (["--images=base,tuned", "--token=short"], "at least 8 characters"),
        (["--images=base,tuned", "--port={taken}"], "cannot serve on 127.0.0.1:{taken} (Address already in use)"),
        (["--images=base,tuned", "--output=gone/votes.sqlite"], "gone is not a folder"),
        ([], "--images is missing"),
        (["--export=votes.jsonl"], "votes.sqlite does not exist; run dpo_jax.vote with --images"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(make_folders, tmp_path, monkeypatch, flags, message):
    make_folders("base", "tuned", "others")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others" / "prompts.jsonl").write_text('{"image": "0-0.png", "prompt": "another", "seed": 0}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = vote("--output=votes.sqlite", "--port=0", *(flag.format(taken=port) for flag in flags))
    assert done.returncode == 1, done.stderr
    assert message.format(taken=port) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "votes.sqlite").exists()


def test_jax_is_not_imported():
    code = "import sys, dpo_jax.vote, dpo_jax.voting.app, dpo_jax.voting.export; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
