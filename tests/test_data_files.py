"""Files of every format, folders of every layout, and errors for damaged ones."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from grpo_jax.data import formats
from grpo_jax.data.files import is_file, read_rows, split_names

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": 'say "a,b"\n;', "answer": "ü\t3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(source, *args, **options):
    return [row for _, row in read_rows(str(source), *args, **options)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


CSV = '"question","answer"\r\n"1+1?",2\r\n"say ""a,b""\n;","ü\t3"\r\n'
TEXTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "blank.json": "\n" + json.dumps(ROWS),
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": "1", "data": ROWS}),
    "pretty_wrapped.json": json.dumps({"version": "1", "data": ROWS}, indent=2),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "utf8.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "a.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "semicolons.csv": 'question;answer\n1+1?;2\n"say ""a,b""\n;";ü\t3\n',
    "a.tsv": 'question\tanswer\n1+1?\t2\n"say ""a,b""\n;"\t"ü\t3"\n',
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_text_formats_plain_and_compressed(tmp_path, name, ending, compress):
    text = TEXTS[name]
    path = write(tmp_path / (name + ending), compress(text if isinstance(text, bytes) else text.encode()))
    assert rows_of(path) == ROWS


def test_one_object_alone_in_a_json_file_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert rows_of(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_parquet_and_arrow(tmp_path):
    assert rows_of(write_parquet(tmp_path / "a.parquet", ROWS)) == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert rows_of(arrow) == ROWS
    assert rows_of(tmp_path / "saved") == ROWS
    assert split_names(str(tmp_path / "saved")) == []
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(tmp_path / "splits")
    assert rows_of(tmp_path / "splits") == ROWS
    assert rows_of(tmp_path / "splits", "test") == ROWS[:1]
    assert split_names(str(tmp_path / "splits")) == ["train", "test"]
    with pytest.raises(FileNotFoundError, match=r"no split 'dev'; it has \['train', 'test'\]"):
        rows_of(tmp_path / "splits", "dev")


def test_places_of_rows(tmp_path):
    places = {
        "a.jsonl": [":1", ":2"],
        "array.json": [" row 1", " row 2"],
        "a.csv": [":2", ":3"],
    }
    for name, ends in places.items():
        path = write(tmp_path / name, TEXTS[name])
        assert [where for where, _ in read_rows(str(path))] == [f"{path}{end}" for end in ends]
    path = write(tmp_path / "b.csv", 'q\n"a\nb"\nc\n')
    assert [where for where, _ in read_rows(str(path))] == [f"{path}:2", f"{path}:4"]
    path = write_parquet(tmp_path / "a.parquet", ROWS * 600)
    assert [where for where, _ in read_rows(str(path))][-1] == f"{path} row 1200"


LAYOUTS = {
    "shards": {
        "data/train-00000-of-00002.jsonl": [0],
        "data/train-00001-of-00002.jsonl": [1],
        "data/test-0.jsonl": [2],
    },
    "folders": {"train/a.jsonl": [0], "train/b.jsonl": [1], "test/c.jsonl": [2]},
    "names": {"train.jsonl": [0, 1], "test.jsonl": [2]},
    "compressed": {"train.jsonl.gz": [0, 1], "test.jsonl.gz": [2]},
    "words": {"my_train_v2.jsonl": [0, 1], "my-eval.jsonl": [2]},
    "formats": {"train.jsonl": [0, 1], "test.csv": [2]},
    "hidden": {"train.jsonl": [0, 1], "test.jsonl": [2], ".cache/train.jsonl": [9], "_x/test.jsonl": [9]},
    "infos": {"train.jsonl": [0, 1], "test.jsonl": [2], "dataset_infos.json": [9]},
    "more files of a split": {"train.jsonl": [0, 1], "train_socratic.jsonl": [9], "test.jsonl": [2]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_folders(tmp_path, name):
    for path, numbers in LAYOUTS[name].items():
        lines = "n\n" + "".join(f"{n}\n" for n in numbers)
        if not path.endswith(".csv"):
            lines = "".join(json.dumps({"n": str(n)}) + "\n" for n in numbers)
        write(tmp_path / path, gzip.compress(lines.encode()) if path.endswith(".gz") else lines)
    write(tmp_path / "README.md", "# no configs here")
    assert [row["n"] for row in rows_of(tmp_path)] == ["0", "1"]
    assert [row["n"] for row in rows_of(tmp_path, "test")] == ["2"]
    assert sorted(split_names(str(tmp_path))) == ["test", "train"]


def test_files_that_name_no_split_are_for_training(tmp_path):
    write(tmp_path / "b.jsonl", '{"n": 2}\n')
    write(tmp_path / "a.jsonl", '{"n": 1}\n')
    assert [row["n"] for row in rows_of(tmp_path)] == [1, 2]
    assert split_names(str(tmp_path)) == ["train"]


def test_subsets_of_a_folder(tmp_path):
    for subset, n in (("main", 1), ("socratic", 2)):
        write(tmp_path / subset / "train-00000-of-00001.jsonl", f'{{"n": {n}}}\n')
    assert [row["n"] for row in rows_of(tmp_path, None, "socratic")] == [2]
    with pytest.raises(ValueError, match=r"several files could be the split train: \['main/train.*subset"):
        rows_of(tmp_path)
    with pytest.raises(ValueError, match=r"subset='other' is set, but .* has \['main', 'socratic'\]"):
        rows_of(tmp_path, None, "other")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("main", "socratic")
    )
    write(tmp_path / "README.md", f"---\nlicense: mit\nconfigs:\n{configs}---\n# Data")
    assert [row["n"] for row in rows_of(tmp_path)] == [1]
    assert [row["n"] for row in rows_of(tmp_path, None, "socratic")] == [2]
    assert split_names(str(tmp_path), "socratic") == ["train"]
    with pytest.raises(FileNotFoundError, match=r"no split 'test'; it has \['train'\]"):
        rows_of(tmp_path, "test")


def test_a_folder_of_the_hubs_cache(tmp_path):
    write(tmp_path / "refs" / "main", "abc")
    write(tmp_path / "snapshots" / "abc" / "data" / "train-0.jsonl", '{"n": 1}\n')
    write(tmp_path / "snapshots" / "old" / "data" / "train-0.jsonl", '{"n": 0}\n')
    assert rows_of(tmp_path) == [{"n": 1}]


def test_a_split_in_two_formats_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(ValueError, match=r"could be the split train: \['train\.jsonl', 'train\.parquet'\]; name one"):
        rows_of(tmp_path)


def test_a_folder_without_data(tmp_path):
    write(tmp_path / "a.txt", "x")
    with pytest.raises(FileNotFoundError, match=r"has no data file .*only \['a\.txt'\]"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "neither a JSON array nor JSON lines"),
        ("a.json", '{"data": [1], "rows": []}\n{"a"', r"a\.json:2 is not JSON"),
        ("a.json", '"text"', "it is a str"),
        ("a.json", "{\n}", r"it is an object with \[\]"),
        ("a.json", "[1]", r"row 1 must be a JSON object; it is a int"),
        ("a.jsonl", "[{}]\n", "is a list; rename a file with one array to .json"),
        ("a.csv", "a,a\n1,2\n", r"columns \['a'\] more than once"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2 has 1 fields; the header has 2"),
        ("a.csv", 'a,b\n1,2\n"1,2\n', r"a\.csv:3 is not CSV"),
        ("a.csv", b"a,b\n1,\xff\n", "is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 50, mtime=0)[:-20], "damaged or truncated"),
        ("a.jsonl.gz", LINES, "damaged or truncated"),
        ("a.jsonl.xz", LINES, "damaged or truncated"),
        ("a.jsonl.zst", LINES, "damaged or truncated"),
        ("a.parquet", "no", "is not a readable parquet file"),
        ("a.arrow", "no", "is not a readable Arrow file"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1 is not JSON"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        rows_of(write(tmp_path / name, content))


def test_bad_rows_can_be_skipped_and_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n\n{\n[1]\n{"n": 2}\n')
    skipped: list[str] = []
    assert rows_of(path, skipped=skipped) == [{"n": 1}, {"n": 2}]
    assert [reason.split(" ")[0] for reason in skipped] == [f"{path}:{n}" for n in (2, 3, 4)]
    skipped.clear()
    assert rows_of(write(tmp_path / "a.csv", "a,b\n1\n1,2\n"), skipped=skipped) == [{"a": "1", "b": "2"}]
    assert len(skipped) == 1


def test_a_line_over_the_limit_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 64)
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": "' + "x" * 500 + '"}\n{"n": 2}')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is longer than 64 bytes"):
        rows_of(path)
    skipped: list[str] = []
    assert rows_of(path, skipped=skipped) == [{"n": 1}, {"n": 2}]
    assert len(skipped) == 1


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n{')
    assert next(read_rows(str(path))) == (f"{path}:1", {"n": 1})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jsonl", True), ("a.csv.gz", True), ("a.JSONL", True), ("openai/gsm8k", False), ("a.parquet.gz", False)],
)
def test_what_a_name_says_of_a_file_that_is_missing(name, expected):
    assert is_file(name) == expected


def test_what_exists_decides_over_its_name(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert not is_file(str(tmp_path / "folder.jsonl"))
    assert is_file(str(write(tmp_path / "noname", "x")))
