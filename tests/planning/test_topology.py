"""Topologies have names, and their links take the time that their rates say."""

from typing import NamedTuple

import jax
import pytest

from dpo_jax.backend import MEMORY_FRACTION
from dpo_jax.planning.topology import DEVICES, GIB, kind_of, parse_topology


def test_counts() -> None:
    assert (parse_topology("v5e:16x16").num_chips, parse_topology("v5e:16x16").num_devices) == (256, 256)
    assert (parse_topology("tpu7x:2x2x1").num_chips, parse_topology("tpu7x:2x2x1").num_devices) == (4, 8)
    assert parse_topology("h200:8").shape == (8, 1)
    assert parse_topology("h100:8x4").num_devices == 32


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v4:2x2", "v5e:0x4", "v5e:4x", "16x16", ""])
def test_unknown_names_are_refused_with_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"--topology={name} is not known. Give one of v5e, v5p"):
        parse_topology(name)


def test_the_wrong_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v5p has 3\. Give, for example, v5p:4x4x4"):
        parse_topology("v5p:8x8")


def test_a_group_over_the_whole_torus_receives_on_all_links() -> None:
    assert parse_topology("v5e:16x16").gather_seconds(200e9, 256) == pytest.approx(1)
    assert parse_topology("v5p:4x4x4").gather_seconds(600e9, 64) == pytest.approx(1)


def test_open_ends_halve_and_smaller_groups_share() -> None:
    assert parse_topology("v6e:8x8").gather_seconds(400e9, 64) == pytest.approx(2)
    assert parse_topology("v5p:4x4x4").gather_seconds(600e9, 4) == pytest.approx(3)
    assert parse_topology("v5p:4x4x4").gather_seconds(600e9, 2) == pytest.approx(3)  # one link's dimension at least
    assert parse_topology("v5p:4x4x4").gather_seconds(600e9, 1) == 0


def test_gpus_of_a_host_share_what_comes_from_others() -> None:
    cluster = parse_topology("h100:8x4")
    assert cluster.gather_seconds(450e9, 8) == pytest.approx(1)
    assert cluster.gather_seconds(400e9, 32) == pytest.approx(400 / 450 + 0.75 * 400 / 8 / 50)


def test_every_device_has_sane_figures() -> None:
    for device in DEVICES.values():
        assert 10 < device.hbm_gib < 200
        assert 70 < device.tflops < 3000
        assert device.link_gb_s < device.hbm_gb_s
        assert device.usable_gib <= device.hbm_gib


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_names_that_jax_gives(device_kind: str, name: str | None) -> None:
    assert kind_of(device_kind) == name


class Card(NamedTuple):
    """What `this_machine` asks of a device."""

    device_kind: str = "NVIDIA GeForce RTX 4090"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 20 * GIB}


def test_this_machine_has_the_memory_that_jax_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Card()] * 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    machine = parse_topology("this")
    assert (machine.name, machine.shape) == ("rtx4090:2x2", (2, 2))
    assert machine.device.usable_gib == pytest.approx(20)
    assert DEVICES["rtx4090"].usable_gib == pytest.approx(23.5 * MEMORY_FRACTION)


def test_a_machine_without_accelerators_is_told() -> None:
    with pytest.raises(ValueError, match=r"cpu is not in the table of devices\. Name one"):
        parse_topology("this")
