"""The examples for clusters, as far as one machine can check them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tenzoo.cli import main
from tests.runs import the_run

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
BIN = Path(sys.executable).parent


def environment(tmp_path, **kwargs):
    """Of a script: programs in ``tmp_path`` come before all others."""
    path = os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    python = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PATH": path, "PYTHONPATH": python, "OMP_NUM_THREADS": "1", **kwargs}


def called_by(script, name, tmp_path, *args, **kwargs):
    """The arguments that a script calls a program with, which is not there."""
    program = tmp_path / name
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/called"\n')
    program.chmod(0o755)
    subprocess.run(["bash", str(script), *args], check=True, cwd=ROOT, env=environment(tmp_path, **kwargs), timeout=60)
    return (tmp_path / "called").read_text().splitlines()


def assert_tenzoo_takes(words, capsys):
    """Each setting is known, and the configs are there."""
    with pytest.raises(SystemExit) as exit_of:
        main([*words, "--print_config"])
    assert exit_of.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_table_names_every_file():
    text = (CLUSTER / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in CLUSTER.iterdir() if path.name != "README.md")


# --- Slurm -----------------------------------------------------------------------------------------------------


def test_slurm_sends_its_signal_to_the_tasks_in_time_and_may_requeue():
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    given = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert given["signal"] == "USR1@90"  # with «B:» it would go to the shell, which would not pass it on
    assert given["requeue"] == ""
    assert given["open-mode"] == "append"
    assert given["ntasks-per-node"] == given["gpus-per-node"]  # a process per GPU


def test_slurm_starts_one_process_per_task(tmp_path, capsys):
    words = called_by(CLUSTER / "slurm.sh", "srun", tmp_path, SLURM_NTASKS_PER_NODE="8", SLURM_NNODES="2")
    assert words[:3] == ["python", "-m", "tenzoo"]
    trainer = assert_tenzoo_takes(words[3:], capsys)["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) in ((8, 2), ("8", 2))
    assert (trainer["accelerator"], trainer["strategy"]) == ("gpu", "ddp")


# --- torchrun --------------------------------------------------------------------------------------------------


def test_torchrun_meets_at_the_head(tmp_path, capsys):
    words = called_by(
        CLUSTER / "torchrun.sh", "torchrun", tmp_path, HEAD="node-1", NODES="3", GPUS="4", RUNS="elsewhere"
    )
    program = words.index("-m")
    assert words[program + 1] == "tenzoo"
    options = dict(zip(words[:program:2], words[1:program:2], strict=True))
    assert options == {
        "--nnodes": "3",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node-1:29500",
        "--rdzv-id": "tenzoo",
    }
    trainer = assert_tenzoo_takes(words[program + 2 :], capsys)["trainer"]
    assert (str(trainer["devices"]), trainer["num_nodes"]) == ("4", 3)
    assert trainer["default_root_dir"] == "elsewhere"


def test_without_a_head_it_says_what_is_missing(tmp_path):
    command = ["bash", str(CLUSTER / "torchrun.sh")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "HEAD: name one of the nodes" in done.stderr


RUN = "covid-sam-s0/2026-11-28_114503/checkpoints"


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    runs = tmp_path / "my runs"
    plain = called_by(CLUSTER / "go_on.sh", "program", tmp_path, str(runs), "program", "fit")
    assert plain == ["fit", "--trainer.default_root_dir", str(runs)]
    for age, name in enumerate(
        (
            f"{RUN}/preempted.ckpt",
            f"{RUN}/last.ckpt",
        )
    ):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).touch()
        os.utime(runs / name, (1e9 - age, 1e9 - age))
    (runs / "version_0/checkpoints").mkdir(parents=True)
    (runs / "version_0/checkpoints/other.ckpt").touch()
    words = called_by(CLUSTER / "go_on.sh", "program", tmp_path, str(runs), "program", "fit")
    assert words == [*plain, "--ckpt_path", str(runs / "covid-sam-s0/2026-11-28_114503/checkpoints/preempted.ckpt")]
    os.utime(runs / f"{RUN}/last.ckpt", (2e9, 2e9))
    words = called_by(CLUSTER / "go_on.sh", "program", tmp_path, str(runs), "program", "fit")
    assert words[-1] == str(runs / "covid-sam-s0/2026-11-28_114503/checkpoints/last.ckpt")


class Node(subprocess.Popen):
    """``torchrun.sh`` on this machine, as one of two nodes with one process each."""

    def __init__(self, tmp_path, number, port, epochs):
        settings = {"HEAD": "localhost", "PORT": str(port), "NODES": "2", "GPUS": "1", "ACCELERATOR": "cpu"}
        settings |= {"CONFIG": "configs/covid_tucker.yaml", "RUNS": str(tmp_path / "runs")}
        self.log = tmp_path / f"{port}.{number}.log"
        with self.log.open("w") as log:
            super().__init__(
                ["bash", str(CLUSTER / "torchrun.sh"), "--trainer.max_epochs", str(epochs)],
                env=environment(tmp_path, **settings),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ended(self):
        """The exit code, and what was said."""
        try:
            return self.wait(300), self.log.read_text()
        finally:
            self.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_train_are_preempted_and_go_on(tmp_path):
    port = free_port()
    nodes = [Node(tmp_path, number, port, epochs=100_000) for number in range(2)]
    runs = tmp_path / "runs"
    for _ in range(1200):
        if any(runs.glob("*/*/checkpoints/last.ckpt")) or any(node.poll() is not None for node in nodes):
            break
        time.sleep(0.25)
    checkpoints = the_run(runs) / "checkpoints"
    nodes[1].send_signal(signal.SIGTERM)
    ends = [node.ended() for node in nodes]
    assert all(code != 0 for code, _ in ends), ends
    saved = torch.load(checkpoints / "preempted.ckpt", weights_only=True)["global_step"]
    assert any(f"SIGTERM after step {saved}" in said for _, said in ends), ends
    epochs = saved // 25 + 3
    port = free_port()
    ends = [node.ended() for node in [Node(tmp_path, number, port, epochs) for number in range(2)]]
    assert all(code == 0 for code, _ in ends), ends
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    assert last["global_step"] == 25 * epochs


# --- Kubernetes ------------------------------------------------------------------------------------------------


@pytest.fixture
def job():
    return yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())


def test_the_job_has_what_the_operator_reads(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    assert set(job["spec"]["runPolicy"]) <= {
        "cleanPodPolicy",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "schedulingPolicy",
        "suspend",
    }
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "ExitCode"  # 143 is retried, an error of ours is not
        assert set(replica["template"]) == {"spec"}
    assert replicas["Master"]["replicas"] == 1


def test_pods_may_save_before_they_are_killed_and_write_only_where_they_may(job):
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts) == {"/workspace/runs", "/workspace/data", "/tmp", "/dev/shm"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(volumes) == set(mounts.values())
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_the_job_runs_a_command_that_there_is(job, capsys):
    replicas = job["spec"]["pytorchReplicaSpecs"]
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        shell, script, runs, *program = container["command"]
        assert (shell, program) == ("bash", ["python", "-m", "tenzoo"])
        assert (ROOT / script).is_file()  # the image has examples/ in its working directory
        trainer = assert_tenzoo_takes([*container["args"], "--trainer.default_root_dir", runs], capsys)["trainer"]
        pods = sum(each["replicas"] for each in replicas.values())
        assert (str(trainer["devices"]), trainer["num_nodes"]) == ("1", pods)


def test_the_image_keeps_what_the_scripts_need():
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"!examples", "!configs", "!tenzoo"} <= set(kept)
    text = (ROOT / "Dockerfile").read_text()
    assert "COPY examples /workspace/examples" in text
    assert "\nUSER 1000\n" in text
    written = [
        "HOME",
        "MPLCONFIGDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "XDG_CACHE_HOME",
        "CUDA_CACHE_PATH",
    ]
    assert all(f"{name}=/tmp" in text for name in written)
