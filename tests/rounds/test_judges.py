"""The judges that a config names are found before anything is begun."""

import json
from unittest.mock import Mock

import pytest

from dpo_jax.errors import MissingFileError
from dpo_jax.models.random_model import write_random_model
from dpo_jax.rounds.judges import find_latent_judge, open_judges
from dpo_jax.rounds.loop import learn
from dpo_jax.training.model import open_model


def test_a_judge_that_is_not_there_is_told_before_the_model_is_opened(online, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.rounds.loop.open_model", lambda *_: pytest.fail("opened the model"))
    for judges, message in (
        (("aesthetic",), r"online\.judges=\('aesthetic',\): .*needs sac.*write .*judges=\"\('aesthetic=SOURCE',\)\"$"),
        (("beauty",), r"online\.judges=\('beauty',\): there is no judge 'beauty'.*\"\('jpeg_compressibility',\)\"$"),
        (("shapes=x",), r"online\.judges=\('shapes=x',\): .*\"\('shapes',\)\"$"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            learn(online("d3po:tiny", **{"online.judges": judges}), tmp_path)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_bug_of_a_judge_keeps_its_class(online, monkeypatch):
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    monkeypatch.setattr("dpo_jax.rounds.judges.open_judge", Mock(side_effect=error))
    with pytest.raises(UnicodeDecodeError, match="invalid start byte"):
        open_judges(online())
    monkeypatch.setattr("dpo_jax.rounds.judges.open_judge", Mock(side_effect=FileNotFoundError(2, "no such", "x")))
    with pytest.raises(MissingFileError, match=r"online\.judges=.*'x'; write for example"):
        open_judges(online())


def test_judges_are_opened_in_order(online):
    names = ("jpeg_incompressibility", "jpeg_compressibility")
    judges, watched = open_judges(online(**{"online.judges": names, "online.watched_judges": ("shapes",)}))
    assert [judge.name for judge in judges] == list(names)
    assert [judge.name for judge in watched] == ["shapes"]


LPO = {"online.branching": True, "online.best_and_worst": True, "sample.every": 0}


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """Folders that hold a UNet only: "alone" as the hub's subfolder, "bare" by itself; and a whole model, "other"."""
    folder = tmp_path_factory.mktemp("unets")
    for seed, name in enumerate(("alone", "bare")):
        write_random_model("sd15", folder / f"whole_{name}", seed=seed)
        (folder / f"whole_{name}" / "unet").rename(folder / name)
    (folder / "whole_alone" / "unet").mkdir()
    (folder / "hub").mkdir()
    (folder / "alone").rename(folder / "hub" / "unet")
    write_random_model("sdxl", folder / "other")
    return folder


def test_a_latent_judge_is_found_where_a_unet_is(online, unets, tmp_path):
    config = online("d3po:tiny", **LPO)
    pipeline = open_model(config, tmp_path)
    own = pipeline.weights["unet"]
    hub, bare = str(unets / "hub"), str(unets / "bare")
    for spec, tuned, reference in (
        ("", None, None),
        (f"{hub}:{bare}", unets / "hub" / "unet", unets / "bare"),
        (f"{hub}:", unets / "hub" / "unet", own),
        (bare, unets / "bare", own),
    ):
        config.online.latent_judge = spec
        found = find_latent_judge(config, pipeline)
        assert found == ({"tuned": tuned, "reference": reference} if spec else {})
    for spec, error, message in (
        (
            f"{hub}:{bare}:{hub}",
            ValueError,
            r"latent_judge=.* must be TUNED:REFERENCE, two models",
        ),
        (f":{hub}", ValueError, r"must be TUNED:REFERENCE"),
        (f"{hub}:{unets / 'other'}", ValueError, r"other/unet has another architecture than the unet of random:sd15"),
        ("runs/gone/exported", FileNotFoundError, r"no folder or file runs/gone/exported"),
    ):
        config.online.latent_judge = spec
        with pytest.raises(error, match=message) as raised:
            find_latent_judge(config, pipeline)
        assert "\n" not in str(raised.value)


def test_a_wrong_latent_judge_begins_no_run(online, tmp_path):
    config = online("d3po:tiny", **LPO | {"online.latent_judge": "runs/gone/exported"})
    with pytest.raises(FileNotFoundError, match="runs/gone/exported"):
        learn(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_it_is_learned_from(online, unets, tmp_path):
    """The rewards of a step's candidates are what the two UNets say; images are seen by the other judge."""
    judge = f"{unets / 'hub'}:{unets / 'bare'}"
    config = online("d3po:tiny", **LPO | {"online.latent_judge": judge, "online.rounds": 1, "loss.beta": 500.0})
    learn(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert trained[0]["pair/count"] == 1, "the best and the worst of each step, and none are tied"
    assert trained[0]["train/gradient_norm"] > 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["a_round"]["images"] == 2
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["fingerprints.latent_judge.tuned"] != saved["fingerprints.latent_judge.reference"]
