"""The JSON-lines log: rows, incomplete lines after a crash, and the rewind on resume."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.jsonl import JsonlLog, read_jsonl, to_line, write_atomically


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back(path):
    log = JsonlLog(path)
    log.append(
        {"step": 1, "reward": 0.5}, {"reward": 0.25, "step": 2, "text": "é\n\u2028 {", "parts": {"a": [1, True, None]}}
    )
    log.append()
    assert read_jsonl(path) == [
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.25, "text": "é\n\u2028 {", "parts": {"a": [1, True, None]}},
    ]


def test_array_scalars_and_arrays(path):
    JsonlLog(path).append(
        {
            "step": jnp.int32(3),
            "float32": jnp.float32(0.1),
            "bfloat16": jnp.bfloat16(1.5),
            "numpy": np.float64(2.5),
            "bool": np.bool_(True),
            "ids": jnp.arange(3),
            "path": Path("a/b"),
        }
    )
    (row,) = read_jsonl(path)
    assert row == {
        "step": 3,
        "float32": float(np.float32(0.1)),
        "bfloat16": 1.5,
        "numpy": 2.5,
        "bool": True,
        "ids": [0, 1, 2],
        "path": "a/b",
    }
    assert type(row["step"]) is int
    assert row["bool"] is True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(math.nan), np.array(math.inf)])
def test_what_json_lacks_is_null(path, value):
    JsonlLog(path).append({"step": 1, "kl": value, "list": [value, 1.0]})
    assert path.read_text() == '{"step": 1, "kl": null, "list": [null, 1.0]}\n'


@given(text=st.text(st.characters(codec=None), max_size=20))
def test_any_text_comes_back_on_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "completions.jsonl"
    JsonlLog(path).append({"step": 0, "completion": text + "\ud800"})
    assert path.read_bytes().count(b"\n") == 1
    assert read_jsonl(path) == [{"step": 0, "completion": text + "\ud800"}]


def test_a_float_that_is_whole_is_a_step(path):
    JsonlLog(path).append({"reward": 1.0, "step": 12.0})
    assert path.read_text() == '{"reward": 1.0, "step": 12}\n'


@pytest.mark.parametrize("row", [{"reward": 1.0}, {"step": 1.5}, {"step": "1"}, {"step": math.nan}])
def test_a_row_without_a_step_is_refused_and_nothing_written(path, row):
    log = JsonlLog(path)
    with pytest.raises(ValueError, match="needs an integer 'step'"):
        log.append({"step": 1}, row)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"step": 1, "text": "\u00e4\ud800", "x": 1e-7, "is": True, "no": None},
            '"text": "\u00e4\\ud800", "x": 1e-07, "is": true, "no": null',
        ),
        ({"step": np.int64(1), "x": np.float32(0.5)}, '"x": 0.5'),
        ({"step": 1, "x": -math.inf, "y": 2.0}, '"x": null, "y": 2.0'),
        ({"step": 1, "x": [math.nan], "y": {None: (1,)}}, '"x": [null], "y": {"None": [1]}'),
    ],
)
def test_a_line_is_the_same_whatever_the_types_of_its_values(row, line):
    assert to_line(row) == ('{"step": 1, ' + line + "}\n").encode()


def test_a_value_that_is_not_json_is_refused(path):
    log = JsonlLog(path)
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        log.append({"step": 1, "thing": object()})
    assert path.read_bytes() == b""


def test_an_append_has_reached_the_file_when_it_returns(path):
    log = JsonlLog(path)
    for step in range(3):
        log.append({"step": step})
        assert len(path.read_bytes().splitlines()) == step + 1


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_not_read_and_is_removed_on_opening(path, cut):
    JsonlLog(path).append({"step": 1}, {"step": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_jsonl(path) == [{"step": 1}]
    JsonlLog(path).append({"step": 2})
    assert path.read_bytes() == whole


def test_a_damaged_line_within_is_named(path):
    JsonlLog(path).append({"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        read_jsonl(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        JsonlLog(path).rewind(1)


def test_a_line_without_a_step_cannot_be_rewound(path):
    log = JsonlLog(path)
    path.write_text('{"step": 1}\n{"reward": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: expected an integer 'step' among \['reward'\]"):
        log.rewind(5)


def test_reading_a_missing_file():
    with pytest.raises(FileNotFoundError):
        read_jsonl("nowhere.jsonl")


@given(restored=st.integers(0, 6), killed=st.integers(0, 6), torn=st.integers(0, 30))
def test_a_resumed_file_is_as_if_never_interrupted(tmp_path_factory, restored, killed, torn):
    def run(log, steps):
        for step in steps:
            log.append({"step": step, "text": "é" * step}, {"step": step, "reward": step / 3})

    folder = tmp_path_factory.mktemp("resume")
    run(JsonlLog(folder / "whole.jsonl"), range(1, 7))
    run(JsonlLog(folder / "resumed.jsonl"), range(1, max(killed, restored) + 1))
    with (folder / "resumed.jsonl").open("ab") as file:
        file.write('{"step": 7, "text": "éééééééééé'.encode()[:torn])

    log = JsonlLog(folder / "resumed.jsonl")
    assert log.rewind(restored) == 2 * max(killed - restored, 0)
    run(log, range(restored + 1, 7))
    assert (folder / "resumed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_rewind_replaces_the_file_in_one_move(path, monkeypatch):
    log = JsonlLog(path)
    log.append({"step": 1}, {"step": 2})
    before = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert log.rewind(1) == 1
    assert read_jsonl(path) == [{"step": 1}]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_write_atomically_takes_parts_and_leaves_the_old_file_where_they_break_off(tmp_path):
    def parts():
        yield b"new"
        raise OSError("the source is gone")

    write_atomically(tmp_path / "a", iter([b"1", b"2\n", b"3"]))
    assert (tmp_path / "a").read_bytes() == b"12\n3"
    with pytest.raises(OSError, match="the source is gone"):
        write_atomically(tmp_path / "a", parts())
    assert (tmp_path / "a").read_bytes() == b"12\n3"


def test_write_atomically_replaces(tmp_path):
    write_atomically(tmp_path / "a", b"1")
    write_atomically(tmp_path / "a", b"22")
    assert (tmp_path / "a").read_bytes() == b"22"


def test_lines_are_what_other_tools_read(path):
    JsonlLog(path).append({"step": 1, "clip_ratio/low_mean": 0.0, "text": "漢"})
    assert json.loads(path.read_text("utf-8")) == {"step": 1, "clip_ratio/low_mean": 0.0, "text": "漢"}
    assert "漢" in path.read_text("utf-8")


@pytest.fixture
def full_disk(mounted):
    """A file system of 64 kilobytes."""
    return mounted("64k")


def test_a_full_disk_is_said_with_the_file_and_loses_no_row(full_disk):
    log = JsonlLog(full_disk / "metrics.jsonl")
    log.append({"step": 1, "text": "x" * 20_000})
    before = log.path.read_bytes()
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        log.append({"step": 2, "text": "x" * 100_000})
    assert log.path.read_bytes() == before
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        write_atomically(log.path, b"x" * 100_000)
    assert [path.name for path in full_disk.iterdir()] == ["metrics.jsonl"]  # nothing that takes space
    log.append({"step": 2})
    assert [row["step"] for row in read_jsonl(log.path)] == [1, 2]
