"""A method in one file of the user's own goes through every command; no file of the package knows of it."""

from pathlib import Path

import pytest

from dpo_jax.cli import load_config
from dpo_jax.errors import UserError
from dpo_jax.methods import find_method
from dpo_jax.planning.estimate import measure_work
from dpo_jax.training.checkpoint import read_config
from dpo_jax.training.defaults import choose_method, describe, with_fields
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.trainer import train

from ..killed_run import train_killed_and_resumed

NAME = "python=my_ipo:IPO"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_it_is_one_short_file() -> None:
    assert len((Path(__file__).parent / "my_ipo.py").read_text().splitlines()) <= 25


def test_it_trains_resumes_after_a_kill_plans_exports_and_has_a_card(
    tiny_config, tmp_path, monkeypatch, capsys
) -> None:
    config = tiny_config("sd15", steps=2, **{"loss.name": NAME, "loss.beta": 100.0, "checkpoint.every": 1})
    workdir = tmp_path / "run"
    losses = train_killed_and_resumed(config, workdir)

    assert f"policy = reference makes {1 / 200**2:.6f}" in capsys.readouterr().err
    assert losses[0] == pytest.approx(1 / 200**2, rel=1e-3)
    assert measure_work(config, "gpu").activation_bytes > 0
    saved = read_config(workdir)
    assert saved is not None
    assert (saved["loss.name"], saved["loss.beta"]) == (NAME, 100.0)
    with pytest.raises(UserError, match=r"loss\.beta was 100\.0, now 1\.0"):
        train(with_fields(config, {"loss.beta": 1.0}), workdir)

    monkeypatch.setattr("dpo_jax.methods.import_object", lambda *_: pytest.fail("an export starts no foreign code"))
    card = (
        export(exportable_run(workdir), tmp_path / "unet", format="unet", dtype=None, max_shard_bytes=10**10)
        / "README.md"
    ).read_text()
    assert "trained by the method `my_ipo:IPO` for 2 steps" in card
    assert "- IPO\n" in card


def test_its_fields_are_listed_and_others_are_refused() -> None:
    config = load_config("sd15")
    choose_method(config, NAME)
    assert "loss.beta" in describe(config)
    assert "loss.label_smoothing" not in describe(config)
    with pytest.raises(UserError, match=r"no field 'loss\.bata'; did you mean config\.loss\.beta\?"):
        with_fields(config, {"loss.bata": 1.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python=my_ipo:ipo", r"config\.loss\.name=python=my_ipo:ipo is a function, not a dpo_jax\.methods\.Method"),
        ("python=my_ipo:IOP", r"my_ipo has no method IOP"),
        ("python=my_opi:IPO", r"there is no module my_opi in the working directory"),
        ("python=my_ipo", r"write python=module:method"),
    ],
)
def test_a_wrong_name_is_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(name)
