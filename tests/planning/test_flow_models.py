"""Plans of flow models at full size: the work that PyTorch's counter finds, and memory that sizes and dtypes state."""

from pathlib import Path
from typing import Any

import pytest

from dpo_jax.cli import load_config, replaced
from dpo_jax.planning.estimate import Work, make_plan, measure_holdings, measure_work
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import parse_topology

ROOT = Path(__file__).parents[2]
LARGE = "stabilityai/stable-diffusion-3.5-large"
MEDIUM_SIZE, MEDIUM_TABLE = 2_243_171_520, 384**2 * 1536


def config_of(file: str, **fields: Any) -> Any:
    return replaced(load_config(str(ROOT / "configs" / file)), fields)


def attention(tokens: int, width: int, layers: int) -> float:
    """Return the TFLOP of attention's two products."""
    return 4 * tokens**2 * width * layers / 1e12


# TFLOP of a forward pass of one image by torch.utils.flop_counter, and of these attention's.
MEDIUM = {
    512: (2.44, attention(1024 + 333, 1536, 24) + attention(1024, 1536, 13)),
    1024: (11.25, attention(4096 + 333, 1536, 24) + attention(4096, 1536, 13)),
}
LARGE_512 = (7.98, attention(1024 + 333, 2432, 38))
FLUX = {512: (21.50, attention(1024 + 512, 3072, 57)), 1024: (74.38, attention(4096 + 512, 3072, 57))}
SCHNELL_512 = (17.69, attention(1024 + 256, 3072, 57))


def case(*values: Any, slow: bool = True) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("file", "fields", "resolution", "tokens", "forward"),
    [
        case("sd35.py", {}, 512, 256, MEDIUM[512]),
        case("sd35.py", {}, 1024, 256, MEDIUM[1024]),
        case("sd35.py:lora", {}, 512, 256, MEDIUM[512], slow=False),
        case("sd35.py:lora", {}, 1024, 256, MEDIUM[1024]),
        case("sd35.py", {"model": LARGE}, 512, 256, LARGE_512),
        case("flux.py", {}, 512, 512, FLUX[512]),
        case("flux.py", {}, 1024, 512, FLUX[1024]),
        case("flux.py:full", {}, 512, 512, FLUX[512]),
        case("flux.py:schnell", {}, 512, 256, SCHNELL_512),
    ],
)
def test_work_of_a_pair_is_eight_forward_passes(
    file: str, fields: dict[str, Any], resolution: int, tokens: int, forward: tuple[float, float]
) -> None:
    """Two images pass through reference and policy, and the gradient costs the policy's pass twice.

    A LoRA's costs it once, except in attention, where queries, keys and values all have gradients.
    """
    config = config_of(file, **{"data.resolution": resolution, "data.text_length": tokens, "remat": "none"}, **fields)
    whole, of_attention = forward
    expected = 6 * whole + 2 * of_attention if config.lora.rank else 8 * whole
    assert measure_work(config, "gpu").model_flops / 1e12 == pytest.approx(
        expected, rel=0.015 if config.lora.rank else 0.01
    )


@pytest.mark.parametrize("is_lora", [False, True])
def test_memory_of_sd35_is_that_of_its_weights(is_lora: bool) -> None:
    config = config_of("sd35.py:lora" if is_lora else "sd35.py")
    pipeline = open_structure(config)
    held = measure_holdings(config, pipeline, 1)
    assert held.encoders == 0
    assert held.frozen_denoiser == 2 * (
        MEDIUM_SIZE + MEDIUM_TABLE
    )  # the table once, though policy and reference read it
    if is_lora:
        assert held.trained_parameters < MEDIUM_SIZE / 100
    else:
        assert held.trained_parameters == MEDIUM_SIZE
        assert measure_holdings(config, pipeline, 8).gathered == 2 * (MEDIUM_SIZE + MEDIUM_TABLE)
    assert (held.trained, held.gradients, held.optimizer) == pytest.approx(
        tuple(bytes * held.trained_parameters for bytes in (4, 4, 8)), rel=1e-6
    )


def test_a_loop_copies_frozen_weights_unless_it_gathers_them() -> None:
    config = config_of("sd35.py:lora", scan=True)
    pipeline, work = open_structure(config), Work("block", 1, 1, 1, 0, 0)
    for fsdp, kind in ((1, "frozen weights, joined for the loop"), (8, "weights gathered")):
        config.mesh.data, config.mesh.fsdp = 8 // fsdp, fsdp
        holdings = measure_holdings(config, pipeline, 8)
        memory = make_plan(holdings, work, parse_topology("h200:8"), batch_size=128, pairs=4).memory
        sizes = {kind: size for kind, size in memory.items() if "gathered" in kind or "joined" in kind}
        assert sizes.pop(kind) == pytest.approx(2 * (MEDIUM_SIZE + MEDIUM_TABLE), rel=0.02)
        assert not any(sizes.values())
