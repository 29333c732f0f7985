"""`deploy/kubernetes.yaml`: what its container runs, and what its exit codes lead to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

FILE = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes.yaml"


def documents() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all(FILE.read_text())
    return service, job


def test_exit_codes_lead_where_they_should() -> None:
    _, job = documents()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    action = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert action == {75: "Ignore", 2: "FailJob"}  # 1 counts towards backoffLimit, which is the rule without a rule
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it


def test_the_container_starts_the_trainer_with_its_rank(tmp_path) -> None:
    service, job = documents()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    trainer = tmp_path / "run_train.sh"
    trainer.write_text('#!/bin/sh\necho "$NODE_RANK $NNODES $RDZV_ENDPOINT $*"\nexit 75\n')
    trainer.chmod(0o755)
    result = subprocess.run(
        [*container["command"], *container["args"]],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": "3", **given},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 75
    rank, nodes, endpoint, *arguments = result.stdout.split()
    assert rank == "3" and arguments == container["args"]
    least, most = map(int, nodes.split(":"))
    assert 1 <= least <= most == job["spec"]["parallelism"] == job["spec"]["completions"]
    name, domain = endpoint.split(":")[0].split(".")
    assert name == f"{job['metadata']['name']}-0"  # the pod that hosts the rendezvous
    assert domain == pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
