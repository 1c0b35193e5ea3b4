"""Optional trackers: what they receive, and errors without their packages."""

import importlib
import json
import math
import struct
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from grpo_jax.monitor.samples import Sample
from grpo_jax.monitor.trackers import open_trackers

SAMPLES = [
    Sample("1+1=", "2", {"accuracy": 1.0, "format": math.nan}, 1.0, 0.5, answer="2", why="at random").row(3),
    Sample("1+2=", "4", {"accuracy": 0.0}, math.nan).row(3),
]
METRICS = {"step": 3, "reward": 0.5, "kl": None, "note": "text", "eval/pass@1": 1}


class FakeRun:
    def __init__(self, **settings):
        self.settings = settings
        self.metrics = []
        self.logged = []
        self.finished = False

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, metrics, step=None):
        self.logged.append((metrics, step))

    def finish(self):
        self.finished = True


class WandBTable:
    """The constructor of ``wandb.Table``, which checks that rows are as long as ``columns``."""

    def __init__(
        self,
        columns=None,
        data=None,
        rows=None,
        dataframe=None,
        dtype=None,
        optional=True,
        allow_mixed_types=False,
        log_mode="IMMUTABLE",
    ):
        assert all(len(row) == len(columns) for row in data)
        self.columns, self.data = columns, data


class TrackioTable:
    """The constructor of ``trackio.Table``, which in version 0.5 ignores ``columns``."""

    def __init__(
        self,
        columns=None,
        data=None,
        dataframe=None,
        rows=None,
        optional=True,
        allow_mixed_types=False,
        log_mode="IMMUTABLE",
    ):
        self.data = data if dataframe is None else dataframe.to_dict(orient="records")


@pytest.fixture
def fake(monkeypatch):
    """Installs a package of that name whose ``init`` makes fake runs, and returns the list of them."""

    def install(name):
        runs = []
        package = ModuleType(name)
        package.Table = {"wandb": WandBTable, "trackio": TrackioTable}[name]
        package.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
        monkeypatch.setitem(sys.modules, name, package)
        return runs

    return install


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_extra_before_any_tracker_opens(tmp_path, fake, monkeypatch, name, package):
    other = "trackio" if name == "wandb" else "wandb"
    runs = fake(other)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}.*{package}.*pip install \"grpo_jax\[{name}\]\""):
        open_trackers([other, name], tmp_path / "run", {})
    assert runs == []
    assert not (tmp_path / "run").exists()


def test_the_extras_exist():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"tensorboard", "wandb", "trackio"} <= set(extras)


def test_unknown_trackers(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown trackers \['mlflow'\]; choose from \['tensorboard', 'trackio', 'wandb'\]"
    ):
        open_trackers(["mlflow"], tmp_path, {})


def test_none(tmp_path):
    assert open_trackers([], tmp_path, {}) == []


def test_wandb(tmp_path, fake, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    runs = fake("wandb")
    (tracker,) = open_trackers(["wandb"], tmp_path / "seed0", {"lr": 1e-6, "out": tmp_path, "limit": math.inf})
    tracker.log(METRICS, 3)
    tracker.close()
    (run,) = runs
    assert run.settings["project"] == "grpo_jax"
    assert run.settings["name"] == "seed0"
    assert run.settings["config"] == {"lr": 1e-6, "out": str(tmp_path), "limit": None}
    assert run.settings["resume"] == "allow"
    assert run.metrics == [("*", "step")]
    assert run.logged == [({"step": 3, "reward": 0.5, "eval/pass@1": 1.0}, None)]
    assert run.finished


def test_trackio(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    runs = fake("trackio")
    (tracker,) = open_trackers(["trackio"], tmp_path / "seed0", {})
    tracker.log(METRICS, 3)
    tracker.close()
    (run,) = runs
    assert run.settings["project"] == "mine"
    assert run.settings["name"].startswith("seed0-")
    assert run.logged == [({"reward": 0.5, "eval/pass@1": 1.0}, 3)]
    assert run.finished


def test_samples_are_a_table(tmp_path, fake):
    wandb, trackio = fake("wandb"), fake("trackio")
    for tracker in open_trackers(["wandb", "trackio"], tmp_path, {}):
        tracker.log_samples(SAMPLES, 3)
    ((logged, step),) = wandb[0].logged
    assert (logged["step"], step) == (3, None)
    assert logged["completions"].columns == [
        *("step", "prompt", "completion", "answer", "why", "reward", "rewards/accuracy", "rewards/format", "advantage")
    ]
    assert logged["completions"].data == [
        [3, "1+1=", "2", "2", "at random", 1.0, 1.0, None, 0.5],
        [3, "1+2=", "4", None, None, None, 0.0, None, None],
    ]
    ((logged, step),) = trackio[0].logged
    assert step == 3
    assert [row["completion"] for row in logged["completions"].data] == ["2", "4"]
    assert logged["completions"].data[1] == {
        **{"step": 3, "prompt": "1+2=", "completion": "4", "answer": None, "reward": None, "rewards/accuracy": 0.0}
    }


def test_a_resumed_run_is_the_same_run_and_another_folder_is_not(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    wandb, trackio = fake("wandb"), fake("trackio")
    for folder, first_step in [("a/seed0", 0), ("a/seed0", 5), ("b/seed0", 0)]:
        open_trackers(["wandb", "trackio"], tmp_path / folder, {}, first_step=first_step)
    assert wandb[0].settings["project"] == "mine"
    assert wandb[0].settings["id"] == wandb[1].settings["id"] != wandb[2].settings["id"]
    assert trackio[0].settings["name"] == trackio[1].settings["name"] != trackio[2].settings["name"]


def test_a_tracker_that_fails_to_open_closes_the_others(tmp_path, fake, monkeypatch):
    runs = fake("trackio")
    package = ModuleType("wandb")

    def init(**_):
        raise OSError("not logged in")

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(OSError, match="not logged in"):
        open_trackers(["trackio", "wandb"], tmp_path, {})
    assert runs[0].finished


def events(folder, event_pb2):
    """Every event below ``folder``, in the order written; a record is length, checksum, event, checksum."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            yield event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size


@pytest.mark.filterwarnings("default")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {"lr": 1e-6})
    tracker.log(METRICS, 3)
    tracker.log_samples(SAMPLES, 3)
    tracker.close()
    written = list(events(tmp_path / "tensorboard", event_pb2))
    scalars = {(e.step, v.tag): v.simple_value for e in written for v in e.summary.value if "text_summary" not in v.tag}
    assert scalars == {(3, "reward"): 0.5, (3, "eval/pass_at_1"): 1.0}
    (config,) = [v.tensor.string_val[0] for e in written for v in e.summary.value if v.tag == "config/text_summary"]
    assert b'"lr": 1e-06' in config
    ((step, samples),) = [
        (e.step, v.tensor.string_val[0].decode())
        for e in written
        for v in e.summary.value
        if v.tag == "completions/text_summary"
    ]
    assert step == 3
    assert [row["completion"] for row in json.loads(samples)] == ["2", "4"]

    (resumed,) = open_trackers(["tensorboard"], tmp_path, {"lr": 1e-6}, first_step=3)
    resumed.close()
    starts = [e.step for e in events(tmp_path / "tensorboard", event_pb2) if e.session_log.status == 1]
    assert starts == [3]
