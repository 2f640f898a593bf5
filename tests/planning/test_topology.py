"""Topologies have names, and their links take the time that their rates say."""

import pytest

from dpo_jax.planning.topology import DEVICES, parse_topology


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
        assert 100 < device.tflops < 3000
        assert device.link_gb_s < device.hbm_gb_s
