"""The cluster examples, as far as they can be checked without a cluster: shellcheck, fields, numbers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_recipe import ROOT

FOLDER = ROOT / "pipelines" / "cluster"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *(ROOT / "pipelines/demo").glob("*.sh")])
# The fields of PyTorchJob v1 (Kubeflow training operator) and of pods that the examples use. Another key is
# a mistake: Kubernetes would refuse it, or drop it without a word.
POD = {
    "terminationGracePeriodSeconds": int,
    "restartPolicy": str,
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "lifecycle": {"preStop": {"exec": {"command": [str]}}},
            "resources": {"limits": {str: (int, str)}, "requests": {str: (int, str)}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str},
            "configMap": {"name": str},
        }
    ],
}
HEAD = {"apiVersion": str, "kind": str, "metadata": {"name": str}}
SCHEMAS = {
    "PyTorchJob": HEAD
    | {
        "spec": {
            "nprocPerNode": str,
            "elasticPolicy": {
                "rdzvBackend": str,
                "minReplicas": int,
                "maxReplicas": int,
                "maxRestarts": int,
            },
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": int, "restartPolicy": str, "template": {"spec": POD}},
            },
        }
    },
    "Job": HEAD
    | {
        "spec": {
            "completionMode": str,
            "completions": int,
            "parallelism": int,
            "backoffLimitPerIndex": int,
            "template": {"spec": POD},
        }
    },
}


def misfits(value, schema, where=""):
    """Every place in which ``value`` is not as ``schema`` says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: expected a mapping"]
        free = schema.get(str)
        unknown = [f"{where}.{key}: unknown" for key in value if not (free or key in schema)]
        known = [
            line
            for key, item in value.items()
            if free or key in schema
            for line in misfits(item, schema.get(key, free), f"{where}.{key}")
        ]
        return unknown + known
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list"]
        return [line for i, item in enumerate(value) for line in misfits(item, schema[0], f"{where}.{i}")]
    return [] if isinstance(value, schema) else [f"{where}: expected {schema}, got {value!r}"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert tool, "pip install 'omnilmm-toolkit[test]'"
    result = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_objects_have_known_fields_of_the_right_types(path):
    for job in yaml.safe_load_all(path.read_text()):
        assert misfits(job, SCHEMAS[job["kind"]]) == []
        spec = job["spec"]
        pod = (spec.get("template") or spec["pytorchReplicaSpecs"]["Worker"]["template"])["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == volumes


def test_the_check_of_fields_can_fail():
    job = yaml.safe_load((FOLDER / "train.kubernetes.yaml").read_text())
    job["spec"]["nprocPerNode"] = 8  # the operator wants a string
    job["spec"]["elasticPolicy"]["maxRestart"] = 1
    found = misfits(job, SCHEMAS["PyTorchJob"])
    assert [line.split(":")[0] for line in found] == [".spec.nprocPerNode", ".spec.elasticPolicy.maxRestart"]


def test_names_and_numbers_agree():
    job = yaml.safe_load((FOLDER / "train.kubernetes.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    script, recipe, *_ = container["args"]
    assert (ROOT / script).exists() and (ROOT / recipe).exists()
    for name in ("train.slurm.sh", "train.torchrun.sh"):
        assert "pipelines/train.py" in (FOLDER / name).read_text()
