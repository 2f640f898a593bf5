"""Values that would train nothing, or that no machine can compute, are refused before anything loads."""

import itertools
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dpo_jax.cli import load_config
from dpo_jax.fields import problem
from dpo_jax.methods import METHODS
from dpo_jax.rounds import config as rounds_config
from dpo_jax.training import config as training_config
from dpo_jax.training.defaults import FIELDS, GROUPS, own_fields, with_fields

ROOT = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")


def offline(**fields: object) -> ConfigDict:
    return with_fields(load_config(f"{ROOT}/configs/tiny.py:tiny"), fields)


def online(**fields: object) -> ConfigDict:
    return with_fields(load_config(f"{ROOT}/configs/tiny_online.py:tiny"), fields)


@pytest.mark.parametrize("fields", [FIELDS, *map(own_fields, METHODS.values())], ids=["all", *METHODS])
def test_every_number_has_a_range_and_every_field_one_line_of_help(fields):
    for path, field in fields.items():
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert str(field), path
        assert problem(field.default, field) is None, path
        assert re.fullmatch(r"[A-Z].{3,110}[.]", field.help), path
        assert path.rpartition(".")[0] in GROUPS


@pytest.mark.parametrize(
    ("field", "values", "reason"),
    [
        ("loss.beta", (-2000.0, 0.0, 1e-60), "must be above 0"),
        ("loss.beta", (NAN, INF, -INF), "must be a finite number"),
        ("loss.beta", (1e39, 10**400), "must be a finite number in float32"),
        ("loss.beta", (True, "1", None, (1.0,)), "must be a number"),
        ("optimizer.learning_rate", (-1e-5, 0.0), "must be above 0"),
        ("optimizer.learning_rate", (NAN, INF), "must be a finite number"),
        ("optimizer.clip_norm", (0.0, -1.0), "must be above 0"),
        ("optimizer.clip_norm", (NAN, -INF), "must be a finite number"),
        ("optimizer.beta1", (1.0, -0.1, 1 - 1e-9), "must be at least 0 and below 1"),
        ("optimizer.beta2", (1.0, 2.0, -2.0), "must be at least -1 and below 1"),
        ("optimizer.beta2", (-0.5,), "must be -1, or at least 0 and below 1"),
        ("optimizer.rates", (3, "to_q", ("to_q", 1), (("to_q",),), ((3, 1),)), "must be a tuple"),
        ("optimizer.rates", ((("to_q", "1"),), (("to_q", True),)), "must be a tuple of pairs such as"),
        ("optimizer.rates", ((("to_q", -1),), (("to_q", NAN),), (("to_q", 1e39),)), "a finite number and at least 0"),
        ("optimizer.rates", ((("(", 1.0),),), "must be a regular expression"),
        ("optimizer.epsilon", (0.0, -1e-8), "must be above 0"),
        ("optimizer.weight_decay", (-0.01,), "must be at least 0"),
        ("optimizer.warmup_steps", (-3,), "must be at least 0"),
        ("ema.decay", (1.0, 1.5, -0.1, 0.999999999), "must be at least 0 and below 1"),
        ("lora.alpha", (-4.0,), "must be at least 0"),
        ("lora.rank", (-1, 10**9), "must be at least 0 and at most 65536"),
        ("lora.targets", ("(", "a{99999999999}", "*"), "must be a regular expression"),
        ("data.generators", (("ok", "["),), "must be a regular expression"),
        ("data.generators", ("name", 3), "must be a tuple"),
        ("data.judges", ((1, 2),), "must be a tuple of texts"),
        ("sample.prompts", (("a", 3),), "must be a tuple of texts"),
        ("seed", (-1, 2**32, 10**20), "must be at least 0 and at most 4294967295"),
        ("steps", (2**31, 10**20), "must be at most 2147483647"),
        ("steps", (0, -1), "must be at least"),
        ("steps", (True, 2.5, "3"), "must be a whole number"),
        ("sample.guidance", (NAN, INF), "must be a finite number"),
        ("sample.steps", (0,), "must be at least 1"),
        ("data.random_flip", (1, "yes"), "must be True or False"),
        ("model", (3, None), "must be a text"),
        ("loss.name", ("dop",), "is not a method. Did you mean dpo[?] Choose one of dpo, ipo, "),
        ("optimizer.name", ("adam",), "must be one of 'adamw', 'adafactor', 'lion'"),
        ("optimizer.schedule", ("cosin",), "must be one of"),
        ("mesh.rules", ((("(", ("fsdp", None)),),), "must be a regular expression"),
        ("mesh.rules", (3, "to_q"), "must be a tuple"),
        ("mesh.rules", (("to_q",), ((3, (None,)),), (("to_q", "fsdp"),)), "must be a tuple of rules such as"),
        ("mesh.rules", ((("to_q", ("fsdq", None)),),), "has 'fsdq' for an axis"),
    ],
)
def test_senseless_values_are_refused(field, values, reason):
    for value in values:
        with pytest.raises(ValueError, match=reason) as error:
            training_config.check(offline(**{field: value}))
        assert str(error.value).startswith(f"config.{field}=")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("field", "values", "reason"),
    [
        ("loss.beta", (NAN, 0.0), "must be"),
        ("online.eta", (NAN, -0.1, 1.1), "must be"),
        ("online.guidance", (NAN, INF), "must be a finite number"),
        ("online.margin", (NAN, 1.0, -0.1), "must be"),
        ("online.branch_after", (1.0,), "must be"),
        ("online.candidates", (0, True, 10**9), "must be"),
        ("online.judges", ("jpeg_compressibility",), "must be a tuple"),
        ("online.timesteps", (NAN, 0.0), "must be"),
        ("online.clip", (NAN,), "must be"),
        ("lora.targets", ("(",), "must be a regular expression"),
    ],
)
def test_senseless_values_of_online_fields_are_refused(field, values, reason):
    for value in values:
        with pytest.raises(ValueError, match=reason) as error:
            rounds_config.check(online(**{field: value}))
        assert str(error.value).startswith(f"config.{field}=")


@pytest.mark.parametrize(
    ("field", "values"), [("clip", (NAN, 0.0, -1.0, INF)), ("advantage_clip", (NAN, 0.0)), ("kl_weight", (NAN, -0.1))]
)
def test_senseless_values_of_a_methods_fields_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^config\.loss\.{field}=.* must be"):
            rounds_config.check(online(**{"loss.name": "dpok", f"loss.{field}": value}))


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(ValueError, match="config") as error:
        training_config.check(offline(**{"loss.beta": -1.0, "ema.decay": 1.0, "dtype": "fp8"}))
    assert str(error.value) == (
        "config.dtype='fp8' must be one of 'float32', 'bfloat16'; "
        "config.ema.decay=1.0 must be at least 0 and below 1; config.loss.beta=-1.0 must be above 0"
    )


def test_sensible_values_at_the_bounds_are_taken():
    for fields in (
        {"seed": 2**32 - 1, "optimizer.clip_norm": INF, "ema.decay": 0.9999, "optimizer.beta1": 0.0},
        {"loss.beta": 1, "lora.alpha": 0.0, "optimizer.weight_decay": 0.0, "sample.guidance": 0},
        {"mesh.rules": ((r"\.to_q\.kernel$", (None, "tensor")),), "mesh.tensor": -1, "mesh.data": 1},
        {"optimizer.rates": ((r"\.norm\d\.", 0), [r"conv", 2.5]), "optimizer.beta2": -1.0},
    ):
        training_config.check(offline(**fields))


def test_sizes_of_a_mesh_that_divide_by_zero():
    for sizes in itertools.product((-1, 0, 1), repeat=3):
        fields = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
        if 0 in sizes or sizes.count(-1) > 1:
            with pytest.raises(
                ValueError, match=r"must be 1 or more, or -1 for the devices|only one of them may be -1"
            ):
                training_config.check(offline(**fields))
        else:
            training_config.check(offline(**fields))


def test_rates_that_overflow_or_remove_whole_weights():
    scaled = {"optimizer.learning_rate": 3e38, "optimizer.scale_by_batch": True, "optimizer.weight_decay": 0.0}
    with pytest.raises(
        ValueError,
        match=r"learning_rate=3e\+38 is 2\.4e\+39 after scale_by_batch and rates, more than 1e\+30; lower it",
    ):
        training_config.check(offline(**scaled, **{"data.batch_size": 8}))
    scaled |= {"optimizer.learning_rate": 1.0, "optimizer.scale_by_batch": False}
    with pytest.raises(ValueError, match=r"learning_rate=1\.0 is 1e\+31 after scale_by_batch and rates"):
        training_config.check(offline(**scaled, **{"optimizer.rates": (("to_q", 1e31), ("to_k", 0))}))
    fields = {"optimizer.learning_rate": 0.5, "optimizer.scale_by_batch": False}
    with pytest.raises(ValueError, match=r"weight_decay=2\.0 times the learning rate of 0\.5 removes whole weights"):
        training_config.check(offline(**fields, **{"optimizer.weight_decay": 2.0}))
    training_config.check(offline(**fields, **{"optimizer.weight_decay": 1.9}))


def test_grids_need_prompts():
    with pytest.raises(ValueError, match=r"sample\.prompts is empty; .*sample\.every=0"):
        training_config.check(offline(**{"sample.prompts": ()}))
    training_config.check(offline(**{"sample.prompts": (), "sample.every": 0}))


def test_a_field_that_a_config_lacks_is_told():
    config = offline()
    with config.unlocked():
        del config.optimizer.beta2
    with pytest.raises(ValueError, match=r"config\.optimizer\.beta2 is missing"):
        training_config.check(config)
    assert math.isfinite(config.optimizer.beta1)


@pytest.mark.parametrize("check", [training_config.check, training_config.check_values, rounds_config.check])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "c.optimizer.lr = 1.0",
            r"^the config has no field 'optimizer\.lr'; did you mean config\.optimizer\.learning_rate\?$",
        ),
        ("c.los = c.loss.copy_and_resolve_references()", r"'los\.beta'; did you mean config\.loss\.beta\?"),
        (
            "c.sed = 3; c.xyzzyx = 3",
            r"'sed'; did you mean config\.seed\?; .*'xyzzyx'; --help of dpo_jax\.train .*fields$",
        ),
    ],
)
def test_a_field_that_does_not_exist_is_refused_in_a_config_file(tmp_path, check, lines, message):
    name = "tiny_online" if check is rounds_config.check else "tiny"
    file = tmp_path / "my.py"
    file.write_text(
        f"""from dpo_jax.cli import load_config

def get_config(arg):
    c = load_config("{name}:tiny").unlock()
    {lines}
    return c
"""
    )
    with pytest.raises(ValueError, match=message):
        check(load_config(str(file)))


def test_what_a_method_sets_goes_with_it():
    config = with_fields(offline(), {"loss.name": "smpo"})
    assert config.data.labels == "soft"
    assert with_fields(config, {"loss.name": "dpo"}).data.labels == "hard"
    spo = with_fields(online(), {"loss.name": "spo"})
    assert (spo.online.branching, spo.online.candidates) == (True, 4)
    d3po = with_fields(spo, {"loss.name": "d3po"})
    assert (d3po.online.branching, d3po.online.candidates) == (False, 2)
    assert d3po.online.rounds == spo.online.rounds
