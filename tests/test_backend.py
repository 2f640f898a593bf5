"""Importing dpo_jax sets the variables of the backends that are installed, and leaves what the user has set."""

import importlib.util
from typing import Any

import pytest

from dpo_jax import backend


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable is set, and no backend for accelerators is installed."""
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend.sys, "modules", {})
    install(monkeypatch)
    return monkeypatch


def install(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    found: dict[str, Any] = dict.fromkeys(modules, object())
    monkeypatch.setattr(importlib.util, "find_spec", found.get)


def test_on_cpus_only_rounding_is_set(variables: pytest.MonkeyPatch) -> None:
    backend.set_variables()
    assert backend.os.environ["XLA_FLAGS"] == "--xla_allow_excess_precision=false"
    assert "LIBTPU_INIT_ARGS" not in backend.os.environ
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in backend.os.environ


def test_gpus_get_flags_and_memory(variables: pytest.MonkeyPatch) -> None:
    install(variables, "jax_cuda12_plugin")
    backend.set_variables()
    assert backend.os.environ["XLA_FLAGS"].split() == [
        "--xla_allow_excess_precision=false",
        *(f"--{name}={value}" for name, value in backend.GPU_FLAGS.items()),
    ]
    assert float(backend.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == backend.MEMORY_FRACTION


def test_tpus_get_flags(variables: pytest.MonkeyPatch) -> None:
    install(variables, "libtpu")
    backend.set_variables()
    assert backend.os.environ["LIBTPU_INIT_ARGS"].split() == [f"--{n}={v}" for n, v in backend.TPU_FLAGS.items()]


def test_what_the_user_has_set_stays(variables: pytest.MonkeyPatch) -> None:
    install(variables, "jax_cuda13_plugin", "libtpu")
    variables.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=here")
    variables.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    variables.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    backend.set_variables()
    flags = backend.os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=here"]
    assert sum("latency_hiding" in flag for flag in flags) == 1
    assert backend.os.environ["LIBTPU_INIT_ARGS"].count("async_all_gather") == 1
    assert backend.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
