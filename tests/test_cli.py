"""Flags, help and errors, as a user meets them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

import dpo_jax
from dpo_jax import cli
from dpo_jax.__main__ import COMMANDS
from dpo_jax.bundled import find_config
from dpo_jax.cli import expand_path, flatten, load_config, unflatten
from dpo_jax.errors import EnvironmentFault, UserError
from dpo_jax.training.defaults import fields_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_flags_and_succeeds(command, name):
    result = command(name, "--help")
    assert result.returncode == 0
    assert "python -m dpo_jax." in result.stdout
    assert "--traceback" not in result.stdout.split("General:")[0]
    assert "\nFlags:\n" not in result.stdout  # every flag is in a section


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.py", "--config.loss.betta=3"], "did you mean config.loss.beta?"),
        (["--config=configs/tiny.py", "--config.setps=3"], "did you mean config.steps?"),
        (["--config", "configs/tiny.py", "--config.loss.betta=3"], "did you mean config.loss.beta?"),
        (["--config=configs/tiny.py", "--config.loss=3"], "it is a group of loss.anchor, loss.auto_beta, loss.beta, "),
        (["--config=tiny", "--config.optimizer.lr=3"], "did you mean config.optimizer.learning_rate?"),
        (["--config=tiny", "--config.loss.name=dop"], "'dop' is not a method. Did you mean dpo?"),
        (
            ["--config=tiny", "--config.loss.name=kto", "--config.data.positive_share=2.0"],
            "must be a share, from 0 to 1",
        ),
        (["--config=tiny", "--config.loss.name=sft", "--config.loss.beta=3"], "the config has no field 'loss.beta'"),
        (["--config=configs/tini.py"], "no config file configs/tini.py; did you mean --config=tiny?"),
        (["--config", "sdxk"], "no config file sdxk; did you mean --config=sdxl?"),
        (["--config=configs/tiny.py:big"], "no variant 'big'"),
        (["--config=configs/tiny.py", "--config.steps=many"], "--config.steps=many"),
        (["--config=configs/tiny.py", "--wrokdir=x"], "Did you mean: workdir"),
        (["--config=configs/tiny.py", "stray"], "unexpected argument 'stray'"),
        ([], "--config is missing"),
        (["--config=configs/tiny.py", "--config.model=https://x/y"], "--config.model=https://x/y is an address on the"),
    ],
)
def test_wrong_flags_are_one_sentence(command, arguments, message, tmp_path):
    result = command("train", f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_lists_the_fields_of_the_method(command):
    text = command("train", "--config=tiny", "--config.loss.name=kto", "--help").stdout
    assert "data.positive_share" in text
    assert "loss.safeguard" not in text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--output=~/x", "--output=HOME/x"),
        ("--output=~", "--output=HOME"),
        ("~/x", "HOME/x"),
        ("--input=~/a.parquet,b,~/c*.parquet", "--input=HOME/a.parquet,b,HOME/c*.parquet"),
        ("--config.data.path=~/x", "--config.data.path=HOME/x"),
        ("--models=base=~/x,tuned=~/y", "--models=base=HOME/x,tuned=HOME/y"),
        ("--output=a~/x", "--output=a~/x"),
        ("--output=~ann/x", "--output=~ann/x"),
        ("--prompts=a/~/b", "--prompts=a/~/b"),
    ],
)
def test_a_tilde_is_the_home_folder_where_a_path_may_begin(argument, expected, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    assert expand_path(argument) == expected


def test_a_tilde_is_expanded_before_flags_are_parsed(monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setattr(sys, "argv", ["command", "--no_such_flag=~/x"])
    with pytest.raises(SystemExit):
        cli.run(lambda: None)
    assert sys.argv == ["command", "--no_such_flag=HOME/x"]


def test_paths_of_the_package_are_found_outside_the_repository(monkeypatch, tmp_path):
    argument = "--models=base=dpo_jax/tiny/model,other=dpo_jax/nothing"
    assert expand_path(argument) == argument
    monkeypatch.chdir(tmp_path)
    assert expand_path(argument) == f"--models=base={ROOT}/dpo_jax/tiny/model,other=dpo_jax/nothing"
    assert load_config("tiny").model == f"{ROOT}/dpo_jax/tiny/model"


def test_configs_have_names(monkeypatch, tmp_path):
    assert load_config("sdxl:lora") == load_config(f"{ROOT}/configs/sdxl.py:lora")
    (tmp_path / "mine.py").write_text("from dpo_jax.training.config import default_config as get_config")
    monkeypatch.chdir(tmp_path)
    assert find_config("mine.py:tiny") == "mine.py:tiny"
    (tmp_path / "sdxl").mkdir()
    assert find_config("sdxl:tiny").endswith("/configs/sdxl.py:tiny")
    with pytest.raises(
        FileNotFoundError, match="The configs that come with dpo_jax are d3po, flow_grpo, flux, nft, sd15"
    ):
        find_config("no/such/file.py")


def test_the_commands_are_listed_and_run_by_their_names(command):
    for arguments in ([], ["--help"]):
        told = command("__main__", *arguments)
        assert told.returncode == 0
        assert re.search(r"^  train +Fine-tune .* pairs\.$", told.stdout, re.MULTILINE)
    assert command("__main__", "--version").stdout == f"dpo_jax {dpo_jax.__version__}\n"
    assert command("train", "--version").stdout == f"dpo_jax {dpo_jax.__version__}\n"
    wrong = command("__main__", "trian")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: dpo_jax has no command 'trian'. Did you mean train?\n",
    )
    helped = command("__main__", "online", "--config=tiny_online", "--help")
    assert helped.stdout.startswith("Align a diffusion model online")
    assert "Images per prompt, from the same starting noise. (at least 1 and at most 1024; default: 4)" in " ".join(
        helped.stdout.split()
    )


def test_every_module_at_the_top_that_is_a_command_is_listed():
    commands = [path.stem for path in (ROOT / "dpo_jax").glob("*.py") if "cli.run(main)" in path.read_text()]
    assert sorted(commands) == sorted(COMMANDS)


PARSE = """
import importlib, sys
from absl import flags
import dpo_jax
from dpo_jax import cli
from dpo_jax.__main__ import COMMANDS
from dpo_jax.bundled import find_config
command, required, *given = sys.argv[1:]
importlib.import_module(f"dpo_jax.{command}")
for flag in given:
    sys.argv = [command, *required.split(), flag]
    try:
        cli.run(lambda: print("accepted", flag))
    except SystemExit as exit:
        print(exit.code, file=sys.stderr)
    flags.FLAGS[flag[2:].split("=")[0]].unparse()
"""


@pytest.mark.parametrize(
    ("command", "required", "wrong", "right"),
    [
        (
            "sample",
            "--prompts=p --output=o",
            "steps=-1 steps=0 guidance=nan guidance=inf guidance=-1 seeds=0 seeds=99999999999 seed=-1 seed=4294967296 "
            "eta=nan eta=1.1 guidance_rescale=nan resolution=0 resolution=-8 batch_size=0 strength=nan strength=2 "
            "lora_scale=nan lora_scale=inf fsdp=0 sampler=ddmi steps=1e3",
            "steps=1 guidance=0 lora_scale=-0.5 eta=1 strength=0.5 seed=4294967295",
        ),
        (
            "evaluate",
            "--judges=shapes --output=o",
            "steps=0 guidance=nan guidance=-1 seeds=0 seed=-1 resolution=0 batch_size=0 sampler=ddmi since=nan",
            "steps=1 guidance=7.5 seed=0",
        ),
        (
            "prepare",
            "--output=o",
            "validation_fraction=2 validation_fraction=-0.1 validation_fraction=nan max_damaged_fraction=nan "
            "max_damaged_fraction=1.5 workers=-1 workers=99999999",
            "validation_fraction=0 validation_fraction=1 workers=0",
        ),
        ("score", "--data=d --judge=shapes", "batch_size=0 timeout=0 timeout=nan timeout=inf dtype=fp8", "timeout=0.5"),
        ("export", "--output=o", "max_shard_gb=0 max_shard_gb=nan max_shard_gb=inf max_shard_gb=-1", "max_shard_gb=2"),
        ("vote", "--output=o", "raters=0 raters=-1 port=-1 port=65536 mode=x", "raters=1 port=0"),
    ],
)
def test_senseless_numbers_are_refused_when_flags_are_parsed(command, required, wrong, right):
    values = {"refused": wrong.split(), "accepted": right.split()}
    flags = [f"--{value}" for value in values["refused"] + values["accepted"]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, command, required, *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.removeprefix("accepted --") for line in done.stdout.splitlines()] == values["accepted"]
    assert len(errors) == len(values["refused"])
    for error, value in zip(errors, values["refused"], strict=True):
        assert value.split("=")[0] in error


def test_every_config_loads_and_every_field_is_known():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for variant in ("", ":tiny"):
            config = load_config(f"{path}{variant}")
            assert flatten(unflatten(flatten(config))) == flatten(config)
            assert set(flatten(config)) == set(fields_of(config))


def test_no_field_is_hidden_by_a_method_of_its_group():
    """`config.update` would be the method of every ConfigDict, whatever a config has there."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        config = load_config(str(path))
        for field in flatten(config):
            *parents, leaf = field.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            assert getattr(node, leaf) == node[leaf], field


def test_unflatten_restores_nesting():
    config = ConfigDict({"a": {"b": {"c": 1}}, "d": "x"})
    assert unflatten(flatten(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "no room is left"), "no room is left"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (OSError(27, "File too large", "/x"), "/x: File too large"),
        (EnvironmentFault("a sentence"), "a sentence"),
        (UserError("a sentence"), "a sentence"),
    ],
)
def test_errors_of_the_operating_system_are_told_without_their_number(error, told, monkeypatch, capsys):
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as exited:
        cli.run(main)
    assert (exited.value.code, capsys.readouterr().err) == (1, f"error: {told}\n")


@pytest.mark.parametrize("error", [ValueError("of ours"), OSError("of a library"), RuntimeError("of XLA")])
def test_a_bug_shows_its_traceback_and_is_kept(error, monkeypatch, capsys, tmp_path):
    def main() -> None:
        raise error

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", str(tmp_path), "", flag_values=values)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.setattr(cli, "TRACEBACK", flags.DEFINE_bool("traceback", False, "", flag_values=values))
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(type(error), match=r"^of"):
        cli.run(main)
    (kept,) = (tmp_path / "errors").iterdir()
    assert kept.read_text().startswith("command\n\nTraceback (most recent call last)")
    assert f"{type(error).__name__}: {error}" in kept.read_text()
    assert capsys.readouterr().err == f"kept in {kept}\n"
