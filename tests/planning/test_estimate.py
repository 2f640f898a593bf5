"""The memory of a plan is that of real arrays on eight devices, and its figures agree with each other."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.cli import load_config, replaced
from dpo_jax.errors import UserError
from dpo_jax.planning import search
from dpo_jax.planning.estimate import Plan, Work, make_plan, measure_holdings, measure_work
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.report import as_text
from dpo_jax.planning.search import choose_settings, settle
from dpo_jax.planning.topology import parse_topology
from dpo_jax.weights.quantised import QTYPES, is_quantised, quantised_shape

ROOT = Path(__file__).parents[2]

# Prints the bytes that each part of a real run has on one of eight devices.
REAL = """
import json, sys
import dpo_jax, jax
jax.config.update("jax_num_cpu_devices", 8)
from dpo_jax import sharding
from dpo_jax.cli import load_config
from dpo_jax.errors import UserError
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import build
from dpo_jax.training.model import open_model
sharding.SMALL = 1024
config = load_config("configs/sdxl.py:tiny")
config.data.batch_size, config.mesh.data, config.mesh.fsdp, config.ema.decay = 8, 2, 4, 0.9
experiment = build(config, resolve(config, device_count=8, process_count=1), open_model(config, sys.argv[1]))
state = experiment.initial_state()

def held(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

print(json.dumps({
    "trained weights, float32": held(state.params),
    "optimizer state": held(state.opt_state),
    "moving average": held(state.ema),
    "reference and frozen denoiser": held(experiment.frozen.reference),
    "VAE and text encoders": held(experiment.frozen.encoders),
}))
"""


def test_memory_is_that_of_real_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    real = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setattr("dpo_jax.sharding.SMALL", 1024)
    config = load_config(str(ROOT / "configs/sdxl.py:tiny"))
    config.data.batch_size, config.mesh.data, config.mesh.fsdp, config.ema.decay = 8, 2, 4, 0.9
    machine, pipeline = parse_topology("v5e:2x4"), open_structure(config)
    planned = make_plan(measure_holdings(config, pipeline, 8), WORK["none"], machine, batch_size=8, pairs=1).memory
    assert {kind: planned[kind] for kind in real} == real
    assert planned["gradients"] == real["trained weights, float32"]
    assert planned["weights gathered"] == 4 * sum(math.prod(spec.shape) for spec in pipeline.denoiser.specs.values())


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4)])
def test_quantised_weights_are_counted_as_they_are_stored(
    kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_jax.weights.quantised.SMALL", 1024)
    config = load_config(str(ROOT / "configs/sd15.py:lora,tiny"))
    config.mesh.data, config.mesh.fsdp = 1, 8
    pipeline = open_structure(config)
    shapes = [spec.shape for name, spec in pipeline.denoiser.specs.items() if is_quantised(name, spec)]
    numbers = sum(map(math.prod, shapes))
    scales = sum(quantised_shape(shape, QTYPES[kind]).scale.size for shape in shapes)
    plain = measure_holdings(config, pipeline, 8)
    config.memory.frozen = kind
    quantised = measure_holdings(config, pipeline, 8)
    saved = (4 - bits / 8) * numbers - 4 * scales  # tiny models are in float32, and too small to be split
    assert saved > 2 * numbers
    assert plain.gathered - quantised.gathered == saved
    assert plain.frozen_denoiser - quantised.frozen_denoiser == saved


GIB = 2**30
WORK = {
    "none": Work("none", 8e12, 8e12, 6 * GIB, 0, 0),
    "dots": Work("dots", 9e12, 8e12, 4 * GIB, 0, 0),
    "attention": Work("attention", 10e12, 8e12, 2 * GIB, 0, 0),
    "block": Work("block", 11e12, 8e12, 1 * GIB, 0, 0),
}


@pytest.fixture
def lora():
    """Return a config whose model takes almost no memory."""
    config = load_config(str(ROOT / "configs/sd15.py:lora,tiny"))
    config.data.batch_size = 2048
    return config


def choose(config, gib: float):
    """Return the plan chosen for pairs that cost what WORK says, on 16 devices with `gib` of memory."""
    machine = parse_topology("v5e:4x4")
    machine = machine._replace(device=machine.device._replace(hbm_gib=gib))
    return search.choose(config, list(WORK.values()), machine)


def test_fit_takes_the_fastest_that_fits_and_of_equals_the_smallest(lora) -> None:
    roomy, tight, tighter = (choose(lora, gib) for gib in (100, 6, 1.2))
    assert (roomy.remat, roomy.micro_batch_per_device) == ("none", 1)
    assert (tight.remat, tighter.remat) == ("dots", "block")
    assert roomy.step_seconds < tight.step_seconds < tighter.step_seconds
    assert all(plan.fits for plan in (roomy, tight, tighter))


def test_fit_rematerializes_only_for_what_it_saves(lora) -> None:
    machine = parse_topology("v5e:4x4")
    machine = machine._replace(device=machine.device._replace(hbm_gib=100))
    for saved, remat in ((0.04, "none"), (0.06, "dots")):
        works = [Work("none", 8e12, 8e12, 6 * GIB, 0, 0), Work("dots", 8e12, 8e12, (1 - saved) * 6 * GIB, 0, 0)]
        assert search.choose(lora, works, machine).remat == remat


@pytest.mark.parametrize(("machine", "pairs"), [("v5e:4x4", 4), ("h200:8x2", 1)])
def test_fit_has_tpus_convolve_whole_images(lora, machine: str, pairs: int) -> None:
    """XLA for TPUs cuts the images of fewer than four pairs into slices that overlap."""
    works = [Work("none", 8e12, 8e12, GIB, 0, 4e12)]
    fast = search.choose(lora, works, parse_topology(machine))
    assert fast.micro_batch_per_device == pairs
    holdings = measure_holdings(lora, open_structure(lora), parse_topology(machine).num_devices)
    cut = make_plan(holdings, works[0], parse_topology(machine), batch_size=2048, pairs=1)
    assert cut.micro_batch_per_device == 1
    slower = 1 + 0.21 * 4 / 8 if pairs > 1 else 1
    assert cut.compute_seconds == pytest.approx(slower * fast.compute_seconds)


def test_the_program_takes_memory_of_tpus(lora) -> None:
    for machine, size in (("v5e:4x4", 1000 * 0.37 * 2**20), ("h200:8x2", 0)):
        topology = parse_topology(machine)
        holdings = measure_holdings(lora, open_structure(lora), topology.num_devices)
        plan = make_plan(holdings, Work("none", 1, 1, 1, 1000, 0), topology, batch_size=2048, pairs=8)
        assert plan.memory["program (from its size, assumed)"] == size


def test_fit_says_what_is_the_least_where_nothing_fits(lora) -> None:
    with pytest.raises(ValueError, match=r"no settings fit v5e:4x4: the least .* is 1\.0 GiB .* 90% of its 0\.5 GiB"):
        choose(lora, 0.5)


def test_fit_refuses_a_batch_that_does_not_divide(lora) -> None:
    lora.data.batch_size = 100
    with pytest.raises(ValueError, match=r"data\.batch_size=100 is not divisible by the 16 devices of v5e:4x4"):
        choose(lora, 16)


def test_figures_follow_from_one_another(lora) -> None:
    topology = parse_topology("v5e:4x4")
    holdings = measure_holdings(lora, open_structure(lora), topology.num_devices)
    plan = make_plan(holdings, WORK["none"], topology, batch_size=2048, pairs=8, utilisation=0.5)
    assert plan.micro_batch_per_device == 8
    assert plan.compute_seconds == pytest.approx(2048 / 16 * 8e12 / (197e12 * 0.5))
    assert plan.step_seconds == pytest.approx(plan.compute_seconds, rel=1e-3)
    assert plan.pairs_per_second_per_chip == pytest.approx(2048 / plan.step_seconds / 16)
    assert plan.chip_hours == pytest.approx(2000 * plan.step_seconds * 16 / 3600)
    assert plan.hbm_bytes == pytest.approx(8 * 6 * GIB, rel=1e-3)
    assert not plan.fits
    assert plan.to_json()["hbm_gib"] == pytest.approx(48, rel=1e-3)


def test_collectives_that_outlast_the_computation_are_not_hidden(lora) -> None:
    topology = parse_topology("v5e:4x4")
    holdings = measure_holdings(lora, open_structure(lora), topology.num_devices)
    plan = make_plan(holdings, Work("none", 1, 1, 1, 0, 0), topology, batch_size=2048, pairs=8, utilisation=1)
    summed, gathered = plan.collectives
    assert (summed.times, gathered.times) == (16, 1)
    assert summed.received_bytes == pytest.approx(2 * 4 * plan.trained_parameters * 15 / 16)
    assert plan.exposed_seconds == pytest.approx(summed.seconds + gathered.seconds, rel=1e-3)


@pytest.mark.parametrize(("scan", "times"), [(False, 8), (True, 1)])
def test_weights_of_blocks_in_a_loop_are_gathered_once_for_all_micro_batches(scan: bool, times: int) -> None:
    config = load_config(str(ROOT / "configs/sdxl.py"))
    config.mesh.data, config.mesh.fsdp, config.scan = 16, 4, scan
    topology = parse_topology("v5p:4x4x4")
    holdings = measure_holdings(config, open_structure(config), topology.num_devices)
    plan = make_plan(holdings, WORK["block"], topology, batch_size=2048, pairs=4)
    gathered = plan.collectives[0]
    assert (gathered.name, gathered.times, gathered.can_hide) == ("weights gathered", times, not scan)
    of_a_unet = 2 * plan.trained_parameters
    assert plan.memory["weights gathered"] == (2 if scan else 1) * of_a_unet
    # Three quarters of policy and reference, and of the encoders, are elsewhere; small parameters aren't split.
    assert 2 * 0.74 * of_a_unet < gathered.received_bytes < 2 * 0.75 * of_a_unet + holdings.encoders * 3


def test_fit_returns_the_config_of_its_plan(traced, lora) -> None:
    config, plan = search.fit(lora, parse_topology("v5e:2x2"), None, lambda message: None)
    assert (config.remat, config.data.micro_batch, config.mesh.fsdp) == (
        plan.remat,
        plan.micro_batch_per_device,
        plan.mesh["fsdp"],
    )
    assert plan.micro_batch_per_device * plan.accumulation * 4 == 2048
    assert lora.data.micro_batch == 64


def test_text_says_what_is_computed_and_what_is_assumed(lora) -> None:
    topology = parse_topology("v5e:4x4")
    holdings = measure_holdings(lora, open_structure(lora), topology.num_devices)
    plan = make_plan(holdings, WORK["block"], topology, batch_size=2048, pairs=2)
    text = as_text(lora, plan)
    assert "activations                             2.00" in text
    assert "8.00 TFLOP, 11.00 including what remat repeats" in text
    assert "products reach 40% of the peak rate (assumed)" in text
    assert "--config.remat=block --config.data.micro_batch=2 --config.mesh.data=16 --config.mesh.fsdp=1" in text
    assert text.endswith("--config.mesh.fsdp=1")  # weights are stored as by default
    stored = as_text(replaced(lora, {"memory.frozen": "nf4"}), plan)
    assert stored == f"{text} --config.memory.frozen=nf4"


def test_work_is_counted_without_kernels_that_cannot_be_looked_into(lora) -> None:
    plain = measure_work(lora, "tpu")
    lora.attention = "splash"
    assert measure_work(lora, "tpu") == plain
    assert plain.flops > plain.model_flops > 0
    lora.attention = "xla"  # its products of queries and keys are in memory
    written_out = measure_work(lora, "tpu")
    assert written_out.activation_bytes > plain.activation_bytes
    assert dataclasses.replace(written_out, activation_bytes=plain.activation_bytes) == plain


@pytest.fixture
def traced(lora, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pairs cost what WORK says, and open the model only once."""
    monkeypatch.setattr(search, "measure_work", lambda config, *_, **__: WORK[config.remat])
    monkeypatch.setattr(search, "open_structure", lambda config: config)
    plain = replaced(lora, {})
    held = functools.cache(lambda num_devices: measure_holdings(plain, open_structure(plain), num_devices))
    monkeypatch.setattr(search, "measure_holdings", lambda config, pipeline, num_devices: held(num_devices))


@pytest.mark.usefixtures("traced")
def test_auto_takes_the_policy_that_repeats_least_and_fits(lora) -> None:
    lora.remat, lora.data.micro_batch = "auto", 1
    for gib, expected in ((7, "none"), (6.5, "dots"), (3, "attention"), (1.5, "block")):
        assert choose_settings(lora, "gpu", 4, gib * GIB).remat == expected
    with pytest.raises(UserError, match=r"remat=block and 1 pairs .* 1\.0 GiB, more than 90% of its 1\.0 GiB\. Raise"):
        choose_settings(lora, "gpu", 4, 1.0 * GIB)


@pytest.mark.usefixtures("traced")
def test_a_micro_batch_of_0_is_the_largest_that_fits(lora) -> None:
    lora.data.micro_batch, lora.remat = 0, "attention"  # 2 GiB per pair
    lora.data.batch_size = 4 * 15
    for gib, pairs in ((7, 3), (14, 5), (32, 5), (34, 15)):
        chosen = choose_settings(lora, "gpu", 4, gib * GIB)
        assert (chosen.remat, chosen.data.micro_batch) == ("attention", pairs)
    with pytest.raises(UserError, match=r"remat=attention and 1 pairs .* 2\.0 GiB.*, or set config\.remat=auto$"):
        choose_settings(lora, "gpu", 4, 2.0 * GIB)
    lora.remat = "auto"
    chosen = choose_settings(lora, "gpu", 4, 14 * GIB)
    assert (chosen.remat, chosen.data.micro_batch) == ("none", 1)


@pytest.mark.usefixtures("traced")
def test_memory_auto_rounds_weights_and_moments_only_where_rematerialization_does_not_suffice(
    lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.memory.auto, lora.remat, lora.data.micro_batch, lora.dtype = True, "none", 1, "bfloat16"
    assert search.storages(lora) == [{}, {"memory.frozen": "int8"}, {"memory.frozen": "nf4"}]
    lora.lora.rank, lora.lora.init = 0, "a LoRA"
    assert search.storages(lora)[1:] == [{"memory.frozen": "int8"}, {"memory.frozen": "nf4"}]
    lora.lora.init = ""
    held = search.measure_holdings(lora, None, 4)

    def measure(config, pipeline, num_devices):
        weights, moments = config.memory.masters == "float32", config.optimizer.moments == "float32"
        return dataclasses.replace(held, trained=(1 + weights) * 4.0 * GIB, optimizer=(1 + moments) * 8.0 * GIB)

    monkeypatch.setattr(search, "measure_holdings", measure)
    found = []
    for gib in (40, 28, 21, 15):
        chosen = choose_settings(lora, "gpu", 4, gib * GIB)
        found.append((chosen.remat, chosen.memory.masters, chosen.optimizer.moments))
    assert found == [
        ("none", "float32", "float32"),
        ("block", "float32", "float32"),
        ("attention", "float32", "int8"),
        ("block", "bfloat16", "int8"),
    ]
    assert search.describe_choice(lora, chosen) == (
        "remat=block, data.micro_batch=1, memory.masters=bfloat16 and optimizer.moments=int8 (updates are rounded "
        "stochastically; moments are rounded to 8 bits at every step; rematerialization repeats a part of the "
        "operations)"
    )
    with pytest.raises(UserError, match=r"remat=block .* Raise config\.mesh\.fsdp$"):
        choose_settings(lora, "gpu", 4, 10 * GIB)
    lora.memory.auto = False
    with pytest.raises(UserError, match=r"set config\.memory\.auto=True, or set config\.remat=auto$"):
        choose_settings(lora, "gpu", 4, 10 * GIB)


@pytest.mark.usefixtures("traced")
def test_settings_are_those_for_the_devices_that_are_here(lora, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.remat, lora.data.micro_batch = "auto", 0
    said: list[str] = []
    settled = settle(lora, said.append)  # CPUs have no memory of their own
    assert (settled.remat, settled.data.micro_batch, said) == ("none", 0, [])

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 3 * GIB}

    monkeypatch.setattr(search.jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(search.jax, "device_count", lambda: 4)
    assert settle(lora, said.append).remat == "attention"
    assert said == ["remat=attention and data.micro_batch=1 fit the 3.0 GiB of each device"]
    lora.remat, lora.data.micro_batch = "dots", 2
    assert settle(lora, said.append) is lora


def test_image_grids_count_too(lora) -> None:
    """While a grid is drawn, a device holds the state, the encoders, and the images that it decodes at a time."""
    lora.data.batch_size, lora.sample.prompts, lora.sample.seeds = 8, ("a", "b", "c"), 2
    pipeline, work = open_structure(lora), dataclasses.replace(WORK["block"], decoding_bytes=3 * GIB)
    encoders = [network.specs for name, network in pipeline.components.items() if name != pipeline.denoiser_name]

    def plan(devices: int) -> Plan:
        machine = parse_topology(f"h100:{devices}")
        return make_plan(measure_holdings(lora, pipeline, devices), work, machine, batch_size=8, pairs=1)

    assert plan(1).drawing["decoding 2 images at a time"] == 6 * GIB
    assert plan(8).drawing["decoding 1 image at a time"] == 3 * GIB
    assert plan(1).hbm_bytes == sum(plan(1).drawing.values()) > sum(plan(1).memory.values())
    of_encoders = sum(math.prod(spec.shape) for specs in encoders for spec in specs.values())
    assert plan(1).drawing["VAE and text encoders"] == 4 * of_encoders
    assert "while image grids are drawn" in as_text(lora, plan(1))
    lora.sample.every = 0
    assert plan(1).drawing == {}
    assert "while image grids" not in as_text(lora, plan(1))


def test_the_decoder_is_traced(lora) -> None:
    """Its largest array, in float32 with the most channels at full size, is there at least once."""
    size, channels = lora.data.resolution, open_structure(lora).vae.config.block_out_channels[0]
    assert measure_work(lora, "gpu").decoding_bytes > size * size * channels * 4
