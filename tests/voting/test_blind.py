"""Nothing that a rater receives tells which model made an image, and only the owner of the study sees results."""

import io
import itertools
import re
import threading

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dpo_jax.voting import app
from dpo_jax.voting.app import results_token

from .conftest import client, owner


def _answer(browser, now, answer=(1, 0)):
    body = {"task": now["task"], "question": now["question"], "answer": list(answer)}
    return browser.post("/api/vote", json=body)


def _all_images(browser):
    """The response for every image that a rater is shown, by id."""
    images = {}
    while (now := browser.get("/api/state").json()["now"]) is not None:
        images |= {id: browser.get(f"/image/{id}") for id in now["images"]}
        _answer(browser, now).raise_for_status()
    return images


def test_nothing_tells_where_an_image_is_from(survey, tmp_path):
    made = survey(folders=("secret_base", "secret_tuned"))
    for k, folder in enumerate(made.store.folders):  # differences other than pixels must not be sent
        notes, exif = PngInfo(), Image.Exif()
        notes.add_text("parameters", f"model: secret_{k}")
        exif[0x010E] = f"secret_{k}"
        with Image.open(folder / "0-0.png") as image:
            image.save(folder / "0-0.png", pnginfo=notes, exif=exif, icc_profile=b"secret profile")
    made.store.digests.clear()
    browser = client(made, "ann")
    sent = [browser.get("/").text, browser.get("/api/state").text, browser.get("/static/vote.js").text]
    now = browser.get("/api/state").json()["now"]
    sent.append(_answer(browser, now).text)
    sent.append(browser.post("/api/undo", json={"task": now["task"], "question": "preference"}).text)
    images = _all_images(browser)
    sent += [f"{reply.headers} {reply.content!r}" for reply in images.values()]
    sent.append(browser.get("/api/state").text)
    assert len(images) == 6
    assert not [text for text in sent if "secret" in text or "0-0" in text or str(tmp_path) in text]
    assert all(re.fullmatch("[0-9a-f]{24}/[0-9a-f]{24}", id) for id in images)
    pixels = {np.asarray(Image.open(io.BytesIO(reply.content)))[4, 4, 0] for reply in images.values()}
    assert pixels == {0, 40}


def test_replies_differ_in_their_pixels_alone(survey):
    made = survey(prompts=6)
    for number, folder in enumerate(made.store.folders):  # as other programs may store images
        for path in folder.glob("*.png"):
            noise_HWC = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
            image = Image.fromarray(noise_HWC if number else np.zeros_like(noise_HWC))
            image.save(path, ("PNG", "JPEG")[number], quality=100, subsampling=0)
    made.store.digests.clear()
    replies = list(_all_images(client(made, "ann")).values())
    assert len(replies) == 12
    assert len({reply.headers["content-length"] for reply in replies}) == 1  # in each pair
    headers = [{name: value for name, value in reply.headers.items() if name != "content-length"} for reply in replies]
    assert all(found == headers[0] for found in headers)
    assert not {"etag", "last-modified", "server"} & set(headers[0])
    assert len({bytes(reply.content[:33]) for reply in replies}) == 1  # signature and header
    assert all(set(re.findall(rb"IHDR|IDAT|IEND|[a-z][A-Za-z]{3}(?=.{4}IDAT)", reply.content)) == {
        b"IHDR", b"IDAT", b"IEND"
    } for reply in replies)  # fmt: skip


@pytest.mark.parametrize("token", [None, "right-token"])
def test_results_are_not_for_raters(survey, token):
    made = survey()
    rater, own = client(made, token=token), results_token(made.store)
    rater.get(f"/?token={token}")
    rater.post("/api/start", json={"name": "ann"}).raise_for_status()
    for path in (
        "/results",
        "/results.json",
        "/votes.csv",
        f"/results?token={token}",
        "/results?token=",
        f"/results?token={own[:-1]}x",
        "/%72esults",
    ):
        reply = rater.get(path)
        assert reply.status_code == 403, path
        assert "base" not in reply.text
    assert own not in rater.get("/").text
    page = owner(made, token).get("/results").text
    assert "Results so far" in page
    assert owner(made, token).get("/static/style.css").status_code == 200
    assert client(made, token="right-token").get(f"/?token={own}").status_code == 200  # opens every page


def test_ids_are_others_for_each_task_and_rater(survey):
    """With three folders each image is in two pairs. Equal ids would tell which images belong to one model."""
    made = survey(folders=("a", "b", "c"), prompts=2)
    images = {name: _all_images(client(made, name)) for name in ("ann", "bob")}
    assert [len(replies) for replies in images.values()] == [12, 12]
    assert not set(images["ann"]) & set(images["bob"])
    of = {name: {id.partition("/")[2] for id in replies} for name, replies in images.items()}
    assert len(of["ann"] | of["bob"]) == 24
    bob = client(made)
    bob.post("/api/start", json={"name": "carl"})
    for id in images["ann"]:
        assert bob.get(f"/image/{id}").status_code == 404  # nobody may compare with what another saw
        assert client(made).get(f"/image/{id}").status_code == 401


def test_all_images_of_a_task_are_read_before_one_is_sent(survey, monkeypatch):
    """Otherwise the time until an image comes would tell how it is stored, and so which folder it is from."""
    made = survey(prompts=4)
    read, lock = [], threading.Lock()

    def note(path, digest):
        with lock:
            read.append(path)
        return original(path, digest)

    original = app._png
    monkeypatch.setattr(app, "_png", note)
    browser, sides = client(made, "ann"), []
    while (now := browser.get("/api/state").json()["now"]) is not None:
        for count, id in enumerate(now["images"]):
            browser.get(f"/image/{id}").raise_for_status()
            assert len(read) == 2 * (len(sides) + 1), count
        sides.append(read[-2].parent.name)
        _answer(browser, now)
    assert set(sides) == {"base"}  # always in the same order, whichever was requested


@pytest.mark.parametrize("what", ["damaged", "another", "gone"])
def test_an_image_that_is_not_the_one_any_more_is_missing_on_both_sides(survey, what):
    made = survey(prompts=1)
    browser = client(made, "ann")
    other = (made.store.folders[1] / "0-0.png").read_bytes()
    data = {"damaged": b"damaged since", "another": other, "gone": None}[what]
    (made.store.folders[0] / "0-0.png").unlink()
    if data is not None:
        (made.store.folders[0] / "0-0.png").write_bytes(data)
    replies = [browser.get(f"/image/{id}") for id in browser.get("/api/state").json()["now"]["images"]]
    found = [(reply.status_code, reply.text) for reply in replies]
    assert found == [(404, "An image of this task was changed or cannot be read any more.")] * 2


def test_answers_are_alike_for_both_sides(survey):
    """The counts do not depend on which image wins or on what others answered."""
    made, replies = survey(stop_early=True, raters=3, prompts=4), []
    for task in made.store.tasks:  # one more vote decides
        made.store.add("early", task, "preference", (1, 0), [0, 1])
    for name, answer in itertools.product(("ann", "bob"), ((1, 0), (0, 1))):
        browser = client(made, f"{name} {answer[0]}")
        now = browser.get("/api/state").json()["now"]
        after = _answer(browser, now, answer).json()
        undone = browser.post("/api/undo", json={"task": now["task"], "question": "preference"}).json()
        assert undone["now"] == now
        replies.append([(state["answered"], state["total"], sorted(state)) for state in (after, undone)])
    assert all(reply == replies[0] for reply in replies)


def test_images_are_sent_without_what_programs_write_beside_the_pixels(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", icc_profile=profile, dpi=(72, 72))
    kinds = re.findall(
        rb"(IHDR|iCCP|sRGB|gAMA|cHRM|pHYs|tEXt|iTXt|eXIf|tIME|IDAT|IEND)", app._png(tmp_path / "a.png", None)
    )
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
