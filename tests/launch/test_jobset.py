"""The Kubernetes jobs follow JobSet's published schema, their numbers agree, and their command lines are valid."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_jax.processes import EXPLICIT
from dpo_jax.training.preemption import EXIT_CODE

ROOT = Path(__file__).parents[2]
TPU, GPU = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
# What the published custom resource definition (v1alpha2, OpenAPI) says of the fields used here.
SCHEMA = json.loads((Path(__file__).parent / "jobset_v1alpha2.json").read_text())
PYTHON_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def faults(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Return where a document departs from a schema; as in Kubernetes, unknown fields are errors too."""
    if "anyOf" in schema:
        return min((faults(value, choice, path) for choice in schema["anyOf"]), key=len)
    if not isinstance(value, PYTHON_TYPES[schema["type"]]):
        return [f"{path} is no {schema['type']}"]
    found = []
    if value not in schema.get("enum", [value]):
        found.append(f"{path}={value}")
    if isinstance(value, list):
        found += [fault for i, item in enumerate(value) for fault in faults(item, schema["items"], f"{path}[{i}]")]
    if isinstance(value, dict) and {"properties", "additionalProperties"} & schema.keys():
        found += [f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            found += faults(item, inner, f"{path}.{name}") if inner else [f"{path}.{name} is unknown"]
    return found


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(document: dict[str, Any]) -> dict[str, Any]:
    (container,) = job_of(document)["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("document", [TPU, GPU], ids=["tpu", "gpu"])
def test_has_the_published_form(document: dict[str, Any]) -> None:
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert faults(document, SCHEMA) == []
    job = job_of(document)
    mounted = {mount["name"] for mount in container_of(document)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_form_is_checked() -> None:
    broken = json.loads(json.dumps(TPU))
    broken["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    job_of(broken)["backofLimit"] = job_of(broken).pop("backoffLimit")
    job_of(broken)["parallelism"] = "4"
    container_of(broken).pop("name")
    assert [fault.split(".")[-1] for fault in faults(broken, SCHEMA)] == [
        "action=Restart",
        "parallelism is no integer",
        "name is missing",
        "backofLimit is unknown",
    ]


@pytest.mark.parametrize("document", [TPU, GPU], ids=["tpu", "gpu"])
def test_starts_again_after_a_notice_or_a_lost_node(document: dict[str, Any]) -> None:
    job = job_of(document)
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert by_code["onExitCodes"]["values"] == [EXIT_CODE]
    assert by_code["onExitCodes"]["containerName"] == container_of(document)["name"]
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert by_code["action"] == by_condition["action"] == "FailJob"
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")


def test_as_many_pods_as_hosts() -> None:
    job = job_of(TPU)
    chips = math.prod(map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert (
        chips / container_of(TPU)["resources"]["limits"]["google.com/tpu"] == job["parallelism"] == job["completions"]
    )

    job, container = job_of(GPU), container_of(GPU)
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert list(variables) == list(EXPLICIT)
    assert int(variables["JAX_NUM_PROCESSES"]) == job["parallelism"] == job["completions"]
    name, (port,) = GPU["metadata"]["name"], container["ports"]
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-hosts-0-0.{name}:{port['containerPort']}"


def test_command_is_understood() -> None:
    assert container_of(TPU)["command"] == container_of(GPU)["command"] == ["python", "-m", "dpo_jax.train"]
    arguments = container_of(TPU)["args"]
    assert [a.split("=")[0] for a in arguments] == [a.split("=")[0] for a in container_of(GPU)["args"]]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_jax.train", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    # All flags and fields were accepted: what it misses is the data, where they say.
    assert "\nerror: no prepared data set at /shared/data/pickapic" in f"\n{done.stderr}"
    assert done.returncode == 1
