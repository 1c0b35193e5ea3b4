"""Launch files: the commands they run, what they do after a SIGTERM, and the fields that must agree."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from grpo_jax.heartbeat import NOT_CONNECTED, TRY_AGAIN
from tests.test_loop_command import run_script

FOLDER = Path(__file__).parent.parent / "experiments/launch"
JOBSETS = sorted(FOLDER.glob("jobset_*.yaml"))
VARIABLES = {"xpk.sh": ("PROJECT", "ZONE", "CLUSTER", "IMAGE"), "tpu_vm.sh": ("TPU", "ZONE"), "slurm.sbatch": ()}
SEPARATOR = "\x1f"
RECORD = """#!/bin/bash
IFS=$'\\x1f'; echo "${0##*/}$IFS$*" >>"$CALLS"; unset IFS
"""


@pytest.fixture
def launch(tmp_path):
    """Run a script with stubs of what it calls; gives its exit status and output, and the calls.

    ``statuses`` are those of the launcher's calls, one after the other; ``state`` is that of the TPU slice.
    """

    def run(name, *args, statuses=(0,), state="READY"):
        bin_folder, calls, queue = tmp_path / "bin", tmp_path / "calls", tmp_path / "statuses"
        bin_folder.mkdir()
        queue.write_text("".join(f"{status}\n" for status in statuses))
        take = f'status=$(head -n 1 {queue}); sed -i 1d {queue}; exit "${{status:-0}}"\n'
        for stub in ("srun", "scontrol", "xpk", "gcloud"):
            special = f"[[ $4 == describe ]] && echo {state} && exit\n" if stub == "gcloud" else ""
            (bin_folder / stub).write_text(RECORD + special + ("exit 0\n" if stub == "scontrol" else take))
            (bin_folder / stub).chmod(0o755)
        environment = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "12",
            **dict.fromkeys(VARIABLES[name], "mine"),
        }
        done = subprocess.run(
            ["bash", FOLDER / name, *args], env=environment, capture_output=True, text=True, timeout=30
        )
        return done, [line.split(SEPARATOR) for line in calls.read_text().split("\n")[:-1]]

    return run


def check_command(words, capsys, monkeypatch):
    """A command of experiments/ parses as the script's own settings; returns them."""
    monkeypatch.setattr("grpo_jax.config.run.connect", lambda *processes, **options: None)
    script, *flags = words
    assert (FOLDER.parent.parent / script).is_file()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    seen = []
    assert run_script(module, flags, main=lambda config: seen.append(config) or 0) == 0, capsys.readouterr().err
    return seen[0]


def words_of(text):
    """The words of a shell command from its script on."""
    out = subprocess.run(["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True)
    words = out.stdout.splitlines()
    return words[next(i for i, word in enumerate(words) if word.startswith("experiments/")) :]


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.iterdir()} == {*VARIABLES, *(path.name for path in JOBSETS)}
    assert len(JOBSETS) == 2


@pytest.mark.parametrize("name", VARIABLES)
def test_scripts_are_valid_and_need_their_variables(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    if VARIABLES[name]:
        done = subprocess.run(["bash", FOLDER / name], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
        assert done.returncode != 0
        assert VARIABLES[name][0] in done.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_scripts_run_their_command_or_another(name, launch, capsys, monkeypatch, tmp_path):
    def words(calls):
        call = next(call for call in calls if call[0] in ("srun", "xpk", "gcloud"))
        if name == "slurm.sbatch":
            return words_of(" ".join(f"'{word}'" for word in call))
        (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
        assert "exec " in command
        return words_of(command.split(" exec ")[-1].removeprefix("exec "))

    done, calls = launch(name)
    assert done.returncode == 0, done.stderr
    config = check_command(words(calls), capsys, monkeypatch)
    assert config.distributed.auto
    assert str(config.run_dir).startswith("/shared/")
    (tmp_path / "bin").rename(tmp_path / "before")
    (tmp_path / "calls").unlink()
    other = ["experiments/sft.py", "--model", "a model", "--dataset", "it's.jsonl"]
    done, calls = launch(name, *other)
    if name != "slurm.sbatch":
        assert words(calls) == [*other, "--distributed.auto", "true"]
    else:
        assert calls[0][-7:] == [*other, "--distributed.auto", "true"]


def test_slurm_starts_the_job_again_after_it_was_saved(launch):
    done, calls = launch("slurm.sbatch", statuses=[75])
    assert done.returncode == 75
    assert [call[0] for call in calls] == ["srun", "scontrol"]
    assert calls[1] == ["scontrol", "requeue", "12"]


def test_slurm_does_not_start_a_job_with_an_error_again(launch):
    done, calls = launch("slurm.sbatch", statuses=[2])
    assert done.returncode == 2
    assert [call[0] for call in calls] == ["srun"]


def test_slurm_tries_a_few_times_whether_the_processes_find_each_other(launch, tmp_path):
    done, calls = launch("slurm.sbatch", statuses=[69, 75])
    assert done.returncode == 75
    assert [call[0] for call in calls] == ["srun", "srun", "scontrol"]
    (tmp_path / "bin").rename(tmp_path / "before")
    (tmp_path / "calls").unlink()
    done, calls = launch("slurm.sbatch", statuses=[69] * 9)
    assert done.returncode == 69
    assert [call[0] for call in calls] == ["srun"] * 3


def test_tpu_vms_try_a_few_times_whether_the_processes_find_each_other(launch):
    done, calls = launch("tpu_vm.sh", statuses=[69, 69, 75, *[69] * 9])
    assert done.returncode == 69
    assert sum(call[4] == "ssh" for call in calls) == 6
    assert "2 of 3 trials" in done.stdout


def test_statuses_of_the_launch_files_are_ours():
    for name in ("slurm.sbatch", "tpu_vm.sh"):
        text = (FOLDER / name).read_text()
        assert f"\nPREEMPTED={TRY_AGAIN}\n" in text
        assert f"\nNOT_CONNECTED={NOT_CONNECTED}\n" in text
    assert f"--restart-on-exit-codes={NOT_CONNECTED},{TRY_AGAIN} " in (FOLDER / "xpk.sh").read_text()


def test_slurm_gives_each_process_a_gpu_and_time_to_save():
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    given = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    options = {name: value for name, _, value in given}
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@180"  # without B: it is sent to the processes
    assert {"requeue", "open-mode"} < set(options)
    assert not {"gpus-per-task", "gpu-bind"} & set(options)


def test_tpu_vms_start_again_after_the_run_was_saved_while_they_are_ready(launch):
    done, calls = launch("tpu_vm.sh", statuses=[75, 75, 0])
    assert done.returncode == 0
    assert sum(call[4] == "ssh" for call in calls) == 3
    assert all("--worker=all" in call for call in calls if call[4] == "ssh")


def test_tpu_vms_that_are_gone_end_the_script(launch):
    done, calls = launch("tpu_vm.sh", statuses=[75, 0], state="PREEMPTED")
    assert done.returncode == 75
    assert sum(call[4] == "ssh" for call in calls) == 1
    assert "the slice is PREEMPTED" in done.stdout


def test_tpu_vms_are_stopped_by_a_signal_that_does_not_start_them_again(launch):
    done, (call,) = launch("tpu_vm.sh", "stop")
    assert done.returncode == 0
    assert "--worker=0" in call
    assert any("pkill -INT" in word for word in call)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)
def test_jobsets_agree_on_the_number_of_processes_and_the_status(path, capsys, monkeypatch):
    jobset = yaml.safe_load(path.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert workers["replicas"] == 1
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 120
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    (restart,) = jobset["spec"]["failurePolicy"]["rules"]
    assert restart["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
    assert environment["HF_HOME"].startswith("/shared/")

    last = str(job["completions"] - 1)
    args = container["args"]
    for name, value in {**environment, "JOB_COMPLETION_INDEX": last}.items():
        args = [arg.replace(f"$({name})", value) for arg in args]
    config = check_command(args, capsys, monkeypatch)
    assert str(config.run_dir).startswith("/shared/")
    if "gpu" in path.stem:
        name = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
        host, port = config.distributed.coordinator.split(":")
        assert host == name
        assert {"containerPort": int(port)} in container["ports"]
        assert config.distributed.num_processes == job["completions"]
        assert config.distributed.process_id == int(last)
        assert container["resources"]["limits"]["nvidia.com/gpu"] * job["completions"] == config.mesh.fsdp
    else:
        assert config.distributed.auto
        rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert int(rows) * int(columns) == chips * job["completions"] == config.mesh.fsdp
