"""A server that is killed again and again while people vote loses no acknowledged vote."""

import itertools
import random
import signal
import threading
import time

import httpx2

from dpo_jax.voting.store import open_votes

KILLS = 10
RATERS = 4


class Rater(threading.Thread):
    """Votes, undoes every seventh vote, and repeats requests without a response."""

    def __init__(self, number: int, url: str, is_over: threading.Event):
        super().__init__()
        self._number, self._url, self._is_over = number, url, is_over
        self.kept: dict[tuple[str, str, str], tuple[int, ...]] = {}
        """The acknowledged votes that were not undone: numbers by place, by (rater, task, question)."""
        self.acknowledged = 0

    def run(self) -> None:
        choices, visit = random.Random(self._number), 0
        while not self._is_over.is_set():
            self._vote_on_everything(f"rater {self._number}, visit {visit}", choices)
            visit += 1  # all tasks are answered; continue under another name

    def _vote_on_everything(self, name: str, choices: random.Random) -> None:
        with httpx2.Client(base_url=self._url, timeout=5) as browser:
            self._ask(browser, "/api/start", {"name": name, "key": name})
            state = self._ask(browser, "/api/state")
            while state is not None and state["now"] is not None:
                key = {"task": state["now"]["task"], "question": state["now"]["question"]}
                answer = choices.choice([(1, 0), (0, 1)])
                state = self._ask(browser, "/api/vote", key | {"answer": answer})
                if state is None:
                    return
                self.acknowledged += 1
                self.kept[name, key["task"], key["question"]] = answer
                if self.acknowledged % 7 == 0:
                    del self.kept[name, key["task"], key["question"]]  # from here on the vote may or may not be stored
                    state = self._ask(browser, "/api/undo", key)
                time.sleep(0.005)

    def _ask(self, browser: httpx2.Client, path: str, body: dict | None = None) -> dict | None:
        """Return the response, or None if the test ends first."""
        while not self._is_over.is_set():
            try:
                reply = browser.post(path, json=body) if body is not None else browser.get(path)
            except httpx2.TransportError:
                time.sleep(0.02)
                continue
            return reply.raise_for_status().json()
        return None


def test_a_killed_server_loses_no_acknowledged_vote(make_folders, serve, tmp_path):
    images = ",".join(map(str, make_folders("base", "tuned", prompts=40)))
    server = serve(
        f"--images={images}", f"--output={tmp_path}/votes.sqlite", "--questions=preference", "--raters=100000"
    )
    is_over, moments = threading.Event(), random.Random(0)
    raters = [Rater(number, server.url, is_over) for number in range(RATERS)]
    for rater in raters:
        rater.start()
    acknowledged = [0]
    try:
        for _ in range(KILLS):
            deadline = time.monotonic() + 20
            while sum(rater.acknowledged for rater in raters) == acknowledged[-1] and time.monotonic() < deadline:
                time.sleep(0.005)  # every run of the server stores some
            time.sleep(moments.uniform(0, 0.3))
            server.stop(signal.SIGKILL)
            acknowledged.append(sum(rater.acknowledged for rater in raters))
            server.start()
    finally:
        is_over.set()
        for rater in raters:
            rater.join()
    server.stop()
    assert all(a < b for a, b in itertools.pairwise(acknowledged))
    with open_votes(tmp_path / "votes.sqlite") as store:
        stored = {(vote.rater, vote.task, vote.question): vote for vote in store.votes()}
        (whole,) = store._connection.execute("PRAGMA integrity_check").fetchone()
    assert whole == "ok"
    kept = {key: answer for rater in raters for key, answer in rater.kept.items()}
    assert len(kept) > 100
    for key, placed in kept.items():
        answer = tuple(placed[stored[key].shown.index(k)] for k in range(2))
        assert stored[key].answer == answer
    assert len(stored) - len(kept) <= sum(rater.acknowledged // 7 + 1 for rater in raters)
