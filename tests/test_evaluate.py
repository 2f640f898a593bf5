"""`python -m dpo_jax.evaluate` from models or images to a report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Command

MODEL = "dpo_jax/tiny/model"


@pytest.fixture
def evaluate(command: Command) -> Callable[..., str]:
    def run(*arguments: str, code: int = 0) -> str:
        done = command("evaluate", *arguments)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_models_then_their_images(evaluate: Callable[..., str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    captions = {"a red circle at the top left": "circles", "a blue square at the bottom right": "squares"}
    prompts.write_text("".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in captions.items()))
    common = [f"--prompts={prompts}", "--judges=shapes,jpeg_compressibility"]
    output = tmp_path / "evaluation"
    drawing = ["--steps=2", "--guidance=2.5", "--seeds=2", "--batch_size=4"]
    models = [f"--models={MODEL},again={MODEL}", *common, *drawing, f"--output={output}"]
    said = evaluate(*models)
    result = json.loads((output / "result.json").read_text())
    assert "again over model: win rate 50.0%" in said
    assert (result["win_rate"], result["ties"], result["comparisons"]) == (0.5, 4, 4)
    assert result["base_score"] == result["tuned_score"] == result["judges"]["shapes"]["models"]["model"]["mean"]
    assert result["models"]["again"]["distance_to_first"] == pytest.approx(0, abs=1e-9)
    images = sorted(path.name for path in (output / "images" / "model").glob("*_*.png"))
    assert images[0] == "00000_a-red-circle-at-the-top-left_1000000.png"
    assert len(images) == 4
    assert (output / "report.html").read_text().startswith("<!doctype html>")

    # Once more: nothing is drawn or judged again. With other settings: refused.
    written = {path: path.stat().st_mtime_ns for path in output.glob("*/**/*.*")}
    evaluate(*models)
    kept = [path for path in written if path.name not in ("prompts.jsonl", "grid.png")]
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: written[path] for path in kept}
    assert "drawn with other settings (steps: 2 there, 3 now)" in evaluate(*models, "--steps=3", code=1)

    # The images alone, as if other programs had made them, and a judge that is a function.
    folders = [f"--images=x={output / 'images' / 'model'},y={output / 'images' / 'again'}"]
    judges = "--judges=shapes,python=dpo_jax.tiny.judge:score"
    run = tmp_path / "run"
    run.mkdir()
    figures = [{"step": 10 * i, "train/loss": 0.6, "validation/pair_accuracy": 0.514 + i / 10} for i in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in figures))
    curves = f"--curves={run},y={run}"
    said = evaluate(*folders, *common, judges, curves, f"--output={tmp_path / 'of_images'}")
    for name in ("run", "y"):
        assert f"{name}: implicit accuracy on held-out pairs 61.4% (step 10)\n" in said
    of_images = json.loads((tmp_path / "of_images" / "result.json").read_text())
    assert of_images["judges"]["shapes"]["models"]["x"] == result["judges"]["shapes"]["models"]["model"]
    assert list(of_images["pair_accuracies"]) == ["run", "y"]
    assert of_images["judges"]["python"]["models"] == of_images["judges"]["shapes"]["models"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --models or --images"),
        (["--models=a,b", "--images=c,d"], "give either --models or --images"),
        (["--models=a"], "--models names only one; give two or more"),
        (["--models=a,b"], "--prompts is missing"),
        (
            ["--models=x/a,y/a", "--prompts=bundled"],
            "the name 'a' of y/a is empty or already taken; give one as in NAME=y/a",
        ),
        (["--images=no_such_a,no_such_b"], "no folder of images at no_such_a"),
        (["--models=a,b", "--prompts=a cat"], "--prompts gives only one prompt ('a cat')"),
        (["--models=a,b", "--prompts=bundled", "--step=2"], "--step goes with training runs, but --models names none"),
        (["--models=a,b", "--prompts=bundled", "--curves=nowhere"], "--curves=nowhere is not a training run"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(
    evaluate: Callable[..., str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    said = evaluate(*arguments, "--judges=shapes", f"--output={tmp_path}", code=1)
    assert message in said
    assert said.count("\n") == 1


def test_what_the_end_needs_is_told_before_anything_is_drawn(evaluate: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    common = [f"--output={output}", "--prompts=bundled", "--steps=1"]
    two = f"--models={MODEL},again={MODEL}"
    for arguments, message in (
        ([two, "--judges=shapes,beauty"], "there is no judge 'beauty'"),
        ([two, "--judges=aesthetic=nowhere.safetensors"], "no folder or file nowhere.safetensors"),
        ([f"--models={MODEL},nowhere", "--judges=shapes"], "no folder or file nowhere"),
        ([two, "--judges=jpeg_compressibility", "--features=clip=absent"], "no folder or file absent"),
        ([two, "--judges=shapes"], "is not of the tiny world"),
        ([two, "--judges=shapes", "--resolution=30"], "resolution=30 must be a multiple of"),
    ):
        assert message in evaluate(*common, *arguments, code=1)
        assert not output.exists()
    (output / "images" / "again").mkdir(parents=True)
    (output / "images" / "again" / "letter.txt").write_text("not an image")
    said = evaluate(*common, two, "--judges=jpeg_compressibility", code=1)
    assert "again contains files that dpo_jax did not write; choose an empty folder" in said
    assert not (output / "images" / "model").exists()
