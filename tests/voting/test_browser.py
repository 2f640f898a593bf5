"""The page in a real browser: clicks, keys, touch, a phone's screen, zoom, and a server that stops.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver); skipped without them.
"""

import shutil
import signal
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dpo_jax.voting.store import open_votes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver on the PATH", allow_module_level=True)

SECONDS = 20
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
SWITCHES = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for switch in (*SWITCHES.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The actions of a rater."""

    def __init__(self, driver: webdriver.Chrome, url: str, screen: dict):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": screen["mobile"]})
        driver.get_log("browser")  # older lines belong to another test
        driver.get(url)

    def start(self, name: str = "ann") -> "Page":
        self.find("#name").send_keys(name + Keys.ENTER)
        return self.wait("ready")

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def ask(self, script: str):
        return self.driver.execute_script(f"return {script}")

    def until(self, condition: Callable[[], object]) -> "Page":
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda _: condition())
        return self

    def wait(self, *states: str) -> "Page":
        return self.until(lambda: self.ask("document.body.dataset.state") in states)

    def press(self, *keys: str) -> "Page":
        for key in keys:
            self.find("body").send_keys(key)
            self.wait("ready", "done")
        return self

    def fits(self) -> bool:
        """Whether the page is not wider than the screen."""
        return self.ask("document.documentElement.scrollWidth <= window.innerWidth")

    def complaints(self) -> list[dict]:
        """Script errors, and whatever the content security policy blocked."""
        return [line for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def page(chromium, make_folders, serve, tmp_path) -> Iterator[Callable[..., Page]]:
    """`page(*flags, screen=PHONE)`: the start page of a study on folders with three prompts."""
    pages = []

    def open_page(*flags: str, screen: dict = DESKTOP, folders: tuple[str, ...] = ("base", "tuned"), side: int = 512):
        images = ",".join(map(str, make_folders(*folders, side=side)))
        open_page.server = serve(f"--images={images}", f"--output={tmp_path}/votes.sqlite", *flags)
        pages.append(Page(chromium, open_page.server.url, screen))
        return pages[-1]

    yield open_page
    chromium.get("about:blank")
    chromium.execute_cdp_cmd("Network.clearBrowserCookies", {})


def _votes(tmp_path):
    with open_votes(tmp_path / "votes.sqlite") as store:
        return store.votes()


def test_keys_vote_and_undo(page, tmp_path):
    opened = page("--questions=preference,appeal", "--ties").start()
    assert opened.text("#count") == "0 of 6 answered"
    assert opened.text("#question") == "Which image do you prefer given the prompt?"
    assert opened.text("#prompt").startswith("prompt ")
    for key in ("←", "→", "space", "Backspace", "Z"):
        assert key in opened.text("#keys")
    assert [button.text for button in opened.find_all("#answers button")] == [
        "Image 1 ←", "Both alike space", "Image 2 →"
    ]  # fmt: skip
    opened.press(Keys.ARROW_LEFT)
    assert opened.text("#question") == "Which image is more visually appealing?"
    assert "prompt 0" not in opened.text("main")
    assert opened.text("#count") == "1 of 6 answered"
    opened.press("2")
    assert opened.text("#count") == "2 of 6 answered"
    assert opened.ask("document.getElementById('bar').value") == 2
    opened.press(" ", Keys.BACKSPACE, Keys.BACKSPACE)  # a tie, undone, and the answer before it
    assert opened.text("#count") == "1 of 6 answered"
    assert opened.text("#question") == "Which image is more visually appealing?"
    opened.press(Keys.ARROW_LEFT, Keys.ARROW_RIGHT, " ", "1", "x", "0")
    opened.wait("done")
    assert "Thank you" in opened.text("#question")
    assert "Your answers are stored" in opened.text("#after")
    assert opened.text("#count") == "6 of 6 answered"
    placed = [[vote.answer[k] for k in vote.shown] for vote in _votes(tmp_path)]
    assert placed == [[1, 0], [1, 0], [0, 1], [0.5, 0.5], [1, 0], [0.5, 0.5]]
    opened.press(Keys.BACKSPACE)
    assert opened.text("#count") == "5 of 6 answered"
    assert len(_votes(tmp_path)) == 5
    assert opened.complaints() == []


def test_a_second_rater_and_a_reload(page):
    opened = page("--questions=preference").start()
    opened.press(Keys.ARROW_LEFT)
    opened.driver.refresh()
    assert opened.wait("ready").text("#count") == "1 of 3 answered"
    opened.find("#leave").click()
    link = opened.find("#link").get_attribute("value")
    opened.find("#stay").click()
    opened.press(Keys.ARROW_LEFT)
    opened.find("#leave").click()
    opened.find("body").send_keys(Keys.ARROW_LEFT)  # does not vote while the dialog is open
    opened.find("#forget").click()
    opened.until(lambda: opened.find_all("#name"))
    opened.find("#name").send_keys("ann" + Keys.ENTER)
    opened.until(lambda: "This name is taken" in opened.text("#message"))
    opened.driver.refresh()
    assert opened.start("bob").text("#count") == "0 of 3 answered"
    opened.driver.get(link)
    assert opened.wait("ready").text("#count") == "2 of 3 answered"


def test_a_click_chooses_an_image_and_a_double_click_answers_once(page, tmp_path):
    opened = page("--questions=preference").start()
    opened.find_all("#images img")[1].click()
    opened.until(lambda: opened.text("#count") == "1 of 3 answered").wait("ready")
    assert not opened.ask("document.getElementById('zoom').open")
    for detail in (2, 1):  # the second click of a double click comes when the next images are there
        click = f"new MouseEvent('click', {{bubbles: true, detail: {detail}}})"
        # In one script: by the next the answer may have been saved.
        script = f"(document.querySelector('#images img').dispatchEvent({click}), document.body.dataset.state)"
        assert opened.ask(script) == ("ready" if detail == 2 else "saving")
    opened.until(lambda: opened.text("#count") == "2 of 3 answered").wait("ready")
    opened.driver.get(page.server.results)  # from now on this browser may see the results
    opened.driver.get(page.server.url)
    opened.wait("ready").find_all("#images img")[0].click()
    opened.wait("done").find("#after a").click()
    opened.until(lambda: "Results so far" in opened.text("h1"))
    assert "3 votes by 1 rater on 3 of 3 comparisons" in opened.text("section")
    assert [[vote.answer[k] for k in vote.shown] for vote in _votes(tmp_path)] == [[0, 1], [1, 0], [1, 0]]
    assert opened.complaints() == []


def test_the_questions_look_different(page):
    opened = page("--questions=preference,appeal,alignment").start()
    seen = []
    for _ in range(3):
        style = "getComputedStyle(document.querySelector('{}')).{}"
        seen.append(
            (
                opened.text("#kind"),
                opened.text("#advice"),
                opened.ask(style.format("#kind", "backgroundColor")),
                opened.ask(style.format("#answers button", "backgroundColor")),
            )
        )
        opened.press(Keys.ARROW_LEFT)
    assert [kind for kind, *_ in seen] == [
        "Question 1 of 3: Overall preference", "Question 2 of 3: Looks only", "Question 3 of 3: Prompt match only"
    ]  # fmt: skip
    assert all(len(set(column)) == 3 for column in zip(*seen, strict=True))


@pytest.mark.parametrize(
    "flags",
    [["--ties"], ["--mode=rank"], ["--mode=points"], ["--mode=tag", "--tags=distorted hand,unsafe"]],
    ids=["pairs", "rank", "points", "tag"],
)
def test_a_phones_screen_is_wide_enough(page, flags):
    opened = page(*flags, screen=PHONE, folders=("base", "tuned", "other"))
    assert opened.ask("[innerWidth, innerHeight]") == [390, 844]
    assert opened.fits()
    opened.start()
    assert opened.fits()
    for button in opened.find_all("#answers button"):
        assert button.rect["height"] >= 40  # for thumbs
        assert opened.ask("innerHeight") >= button.rect["y"] + button.rect["height"]  # without scrolling
    opened.driver.get(page.server.results)
    assert opened.fits()


def test_a_phone_shows_both_images_at_once_in_one_column_and_votes_by_touch(page, tmp_path):
    opened = page("--questions=alignment", screen=PHONE).start()
    one, two = (image.rect for image in opened.find_all("#images img"))
    assert one["y"] + one["height"] <= two["y"]
    assert two["y"] + two["height"] <= opened.find("#answers button").rect["y"]
    for number in "12":
        button = next(button for button in opened.find_all("#answers button") if button.text == f"Image {number}")
        button.click()
        opened.wait("ready", "done")
    opened.find("#undo").click()
    opened.wait("ready").until(lambda: opened.text("#count") == "1 of 3 answered")
    assert [[vote.answer[k] for k in vote.shown] for vote in _votes(tmp_path)] == [[1, 0]]


def test_zoom(page, tmp_path):
    opened = page("--questions=preference").start()
    ids = [image.get_attribute("src") for image in opened.find_all("#images img")]
    opened.find_all(".enlarge")[1].click()
    assert opened.ask("document.getElementById('zoom').open")
    large = opened.find("#large")
    assert large.get_attribute("src") == ids[1]
    opened.until(lambda: large.rect["height"] > 600)
    assert large.rect["width"] <= 1280
    large.click()
    opened.until(lambda: large.rect["width"] >= 2 * 1280 - 40)
    large.click()
    opened.find("body").send_keys(Keys.ARROW_LEFT)  # the other image, not a vote
    assert opened.find("#large").get_attribute("src") == ids[0]
    opened.find("body").send_keys(Keys.ESCAPE)
    opened.until(lambda: not opened.ask("document.getElementById('zoom').open"))
    assert opened.text("#count") == "0 of 3 answered"
    assert _votes(tmp_path) == []
    opened.find("body").send_keys("z")
    assert opened.find("#large").get_attribute("src") == ids[0]
    opened.find("#close").click()
    assert opened.press(Keys.ARROW_LEFT).text("#count") == "1 of 3 answered"


def test_ranks_by_keys_and_clicks(page, tmp_path):
    opened = page("--mode=rank", folders=("a", "b", "c")).start()
    assert opened.text("#keys").startswith("Keys: 1 to 3 choose an image")
    opened.find("body").send_keys("3", Keys.BACKSPACE, "2", "1")  # the last rank follows by itself
    assert [mark.text for mark in opened.find_all(".mark")] == ["2", "1", "3"]
    opened.find("body").send_keys(Keys.ENTER)
    opened.until(lambda: opened.text("#count") == "1 of 3 answered").wait("ready")
    for place in (2, 0):
        opened.find_all("#images img")[place].click()
    opened.find("#save").click()
    opened.until(lambda: opened.text("#count") == "2 of 3 answered").wait("ready")
    placed = [[vote.answer[k] for k in vote.shown] for vote in _votes(tmp_path)]
    assert placed == [[2, 1, 3], [2, 3, 1]]
    assert opened.complaints() == []


def test_points_by_keys_and_clicks(page, tmp_path):
    opened = page("--mode=points").start()
    assert not opened.find("#save").is_enabled()
    opened.find("body").send_keys("4", "2", Keys.BACKSPACE, "5", Keys.ENTER)
    opened.until(lambda: opened.text("#count") == "1 of 3 answered").wait("ready")
    for row, points in zip(opened.find_all(".points"), (1, 5), strict=True):
        row.find_elements(By.TAG_NAME, "button")[points - 1].click()
    opened.find("#save").click()
    opened.until(lambda: opened.text("#count") == "2 of 3 answered")
    assert [[vote.answer[k] for k in vote.shown] for vote in _votes(tmp_path)] == [[4, 5], [1, 5]]


def test_tags_by_keys(page, tmp_path):
    opened = page("--mode=tag", "--tags=distorted hand,unsafe").start()
    assert opened.text("#question") == "Distorted hand?"
    opened.press("y", Keys.ARROW_LEFT)
    assert opened.text("#count") == "2 of 12 answered"
    assert [(vote.question, vote.answer) for vote in _votes(tmp_path)] == [("distorted hand", (1,)), ("unsafe", (0,))]


def test_a_vote_waits_for_a_server_that_went_away(page, tmp_path):
    opened = page("--questions=preference").start()
    page.server.stop(signal.SIGKILL)
    opened.find("body").send_keys(Keys.ARROW_RIGHT)
    opened.until(lambda: "Trying again" in opened.text("#message"))
    assert opened.text("#count") == "0 of 3 answered"
    page.server.start()
    opened.until(lambda: opened.text("#count") == "1 of 3 answered").wait("ready")
    assert opened.text("#message") == ""
    assert len(_votes(tmp_path)) == 1


def test_the_next_images_are_there_before_they_are_shown_and_nothing_is_from_elsewhere(page):
    opened = page("--questions=preference").start()
    shown = opened.ask("[...document.images].filter((image) => image.src).map((image) => image.src)")
    loaded = "performance.getEntriesByType('resource').map((entry) => entry.name)"
    opened.until(lambda: sum("/image/" in name for name in opened.ask(loaded)) == 6)
    assert len({name for name in opened.ask(loaded) if "/image/" in name} - set(shown)) == 4
    origin = opened.ask("location.origin")
    assert all(name.startswith(origin) for name in opened.ask(loaded))
    before = len(opened.ask(loaded))
    opened.press(Keys.ARROW_LEFT)
    assert not [name for name in opened.ask(loaded)[before:] if "/image/" in name]
    assert opened.complaints() == []
