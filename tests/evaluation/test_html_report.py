"""The report is one self-contained file that a browser can show."""

import base64
import html
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dpo_jax.evaluation import plots
from dpo_jax.evaluation.compare import compare, match
from dpo_jax.evaluation.html_report import write_report
from dpo_jax.evaluation.winrate import verdict, win_rate_in
from dpo_jax.sampling.image_folder import Entry, write_list
from dpo_jax.sampling.prompts import Prompt

MODELS = ("base", "half", "<tuned>")
METRICS = [
    {"step": 10.0 * i, "train/loss": 0.7, "validation/pair_accuracy": 0.6}
    | {"error/winner": 0.5 + i, "error/loser": 0.6 + i, "error/reference_winner": 0.5, "error/reference_loser": 0.6}
    for i in range(5)
]
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def report(tmp_path):
    """Three models, 12 prompts in two categories, two judges, the curves of two runs; gives path, scores, result."""
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
    result |= {"date": "2031-05-07", "version": "9.8.7", "sources": {name: f"models/{name}" for name in MODELS}}
    result |= {"pair_accuracies": {"half": {"accuracy": 0.614, "step": 40.0}, "run": {"accuracy": 0.715, "step": 40.0}}}
    settings = {"steps": 20, "guidance": 0.0, "negative_prompt": "", "models": {"base": "sdxl-0123"}}
    path = tmp_path / "report.html"
    for file in (path, tmp_path / "again.html"):
        write_report(file, result, contest, scores, settings, {"half": METRICS, "run": METRICS})
    return path, scores, result


def test_the_same_evaluation_gives_the_same_bytes(report):
    assert report[0].read_bytes() == report[0].with_name("again.html").read_bytes()


def test_all_is_in_one_file(report):
    path, _, result = report
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<tuned>" not in text  # escaped
    assert "prompt 3 &lt;b&gt;" in text
    for row in result["judges"]["bad"]["win_rates"]:
        assert f"{row['rate']:.1%}" in text
    for of_model in result["judges"]["bad"]["models"].values():
        means = [of_category["mean"] for of_category in of_model["categories"].values()]
        assert all(f'<td class="n">{mean:.4g}</td>' in text for mean in [*means, of_model["mean_of_categories"]])
    assert "steps: 20; guidance: 0.0</p>" in text
    assert [file.name for file in path.parent.iterdir() if "partial" in file.name] == []


def test_it_opens_with_verdicts_models_date_and_version(report):
    path, _, result = report
    text = html.unescape(path.read_text())
    rows = [(judge, row) for judge in result["judges"] for row in result["judges"][judge]["win_rates"]]
    verdicts = [verdict(row["of"], row["over"], win_rate_in(row), judge) for judge, row in rows]
    assert f"<h1>{verdicts[0]}</h1>" in text
    assert "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in verdicts[1:]) + "</ul>" in text
    assert "Models, compared on 2031-05-07 with dpo_jax 9.8.7" in text
    assert "base</th><td>models/base</td><td>sdxl-0123</td>" in text


def test_a_model_has_one_colour_and_runs_that_are_no_models_have_others(report):
    text = report[0].read_text()
    found = {}
    for colour, name in re.findall(
        r'<span class="swatch" style="background: (#\w+)" aria-hidden="true"></span>([^ <:]+)', text
    ):
        found.setdefault(html.unescape(name), set()).add(colour)
    assert found == {name: {colour} for name, colour in plots.colours([*MODELS, "run"]).items()}
    assert len(set(map(tuple, found.values()))) == 4
    svgs = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    assert len(svgs) == 2 * 2 + 3  # win rates and scores by two judges; loss, accuracy and error
    shown = [set(re.findall(r"stroke: (#[0-9a-f]{6})", svg)) & set(plots.COLOURS) for svg in svgs]
    colour = plots.colours([*MODELS, "run"])
    assert shown[1] == {colour[name] for name in MODELS}
    assert all(found == {colour["half"], colour["run"]} for found in shown[4:])


def test_curves_are_told_in_words_and_errors_are_relative_to_the_reference():
    told = {plot.text for plot in plots.curves({"a": METRICS}, {"a": "#4477aa"})}
    assert "Training curves: error on training pairs by step. a, winner: 4 at step 40; a, loser: 4 at step 40." in told
    assert "Training curves: accuracy on held-out pairs by step. a: 0.6 at step 40." in told
    absolute = [{"step": 1.0, "error/winner": 0.25}]
    assert [plot.text for plot in plots.curves({"sft": absolute}, {"sft": "#4477aa"})] == [
        "Training curves: error on training pairs by step. sft, winner: 0.25 at step 1."
    ]


def test_every_image_has_a_text_and_every_heading_of_a_table_a_scope(report):
    text = report[0].read_text()
    assert all(re.search(r' alt="[^"]{10,}"', image) for image in re.findall("<img[^>]*>", text))
    assert all(' scope="' in heading for heading in re.findall(r"<th[ >][^>]*>?", text))
    assert {"61.4%", "71.5%"} <= set(re.findall(r"[\d.]+%", text))


def test_each_pair_of_models_has_its_best_worst_and_most_contested_prompts(report):
    path, scores, _ = report
    parts = html.unescape(path.read_text()).split("<summary>")[1:]
    titles = [part.split("</summary>")[0] for part in parts]
    pairs = [("half", "base"), ("<tuned>", "base"), ("<tuned>", "half")]
    assert titles == [f"Prompts: {of} and {over}, by {judge}" for judge in ("good", "bad") for of, over in pairs]
    lead = scores["good"]["<tuned>"] - scores["good"]["base"]
    sections = dict(re.findall(r"<h3>(.*?)</h3>(.*?)(?=<h3>|</details>)", parts[1], re.DOTALL))
    shown = {title: [int(n) for n in re.findall(r"<p>prompt (\d+)", part)] for title, part in sections.items()}
    assert shown == {
        "Best for <tuned>": [i for i in np.argsort(-lead) if lead[i] > 0][:6],
        "Worst for <tuned>": [i for i in np.argsort(lead) if lead[i] < 0][:6],
        "Most contested": np.argsort(abs(lead))[:6].tolist(),
    }
    assert re.findall('alt="Image by ([^:]+):', parts[1])[:2] == ["base", "<tuned>"]


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
