"""The report is one file with everything in it, and a browser shows it."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluation.compare import compare, match
from dpo_jax.evaluation.html_report import write_report
from dpo_jax.sampling.image_folder import Entry, write_list
from dpo_jax.sampling.prompts import Prompt

MODELS = ("base", "half", "<tuned>")
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def report(tmp_path):
    """Three models, 12 prompts in two categories, two judges and the curves of a run."""
    prompts = [Prompt(f"prompt {i} <b>&</b>", "ab"[i % 2]) for i in range(12)]
    rng = np.random.default_rng(0)
    for model in range(3):
        (tmp_path / str(model)).mkdir()
        entries = [Entry(f"{i}.png", prompt.text, 0) for i, prompt in enumerate(prompts)]
        for entry in entries:
            size = (600, 400, 3) if model == 2 else (32, 32, 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / str(model) / entry.image)
        write_list(tmp_path / str(model), entries)
    contest = match({name: tmp_path / str(i) for i, name in enumerate(MODELS)}, prompts)
    scores = {
        judge: {name: rng.normal(size=12) + i * gain for i, name in enumerate(MODELS)}
        for judge, gain in (("good", 0.5), ("bad", -0.5))
    }
    result = compare(contest, scores, {name: rng.normal(size=(12, 3)) for name in MODELS}) | {"features": "thumbnails"}
    rows = [{"step": 10.0 * i, "train/loss": 0.7 - i / 100} for i in range(5)]
    path = tmp_path / "report.html"
    write_report(path, result, contest, scores, {"steps": 20, "negative_prompt": ""}, {"run": rows})
    return path, scores, result


def test_all_is_in_one_file(report):
    path, _, result = report
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<tuned>" not in text  # escaped
    assert "prompt 3 &lt;b&gt;" in text
    for row in result["judges"]["bad"]["win_rates"]:
        assert f"{row['rate']:.1%}" in text
    assert "steps: 20" in text
    assert "negative_prompt" not in text  # there is none
    assert text.count("training curve") == 1
    assert [file.name for file in path.parent.iterdir() if "partial" in file.name] == []


def test_the_best_and_the_worst_cases_are_these(report):
    path, scores, _ = report
    lead = scores["good"]["<tuned>"] - scores["good"]["base"]
    sections = re.split(r"<h[23]>", path.read_text())
    ahead = next(part for part in sections if part.startswith("&lt;tuned&gt; furthest ahead of base"))
    shown = [int(number) for number in re.findall(r"<p>prompt (\d+)", ahead)]
    assert shown == [i for i in np.argsort(-lead) if lead[i] > 0][:6]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium and chromium-driver")
def test_a_browser_shows_it(report, tmp_path):
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    for flag in (*flags, "--disable-quic", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_window_size(500, 900)
        driver.get(f"file://{report[0]}")
        widths = driver.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
        assert len(widths) > 40
        assert min(widths) > 0
        assert driver.title == "base, half, <tuned>"
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        driver.quit()
