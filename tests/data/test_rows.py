"""Every kind of file gives the same rows; every fault has its place."""

import gzip
import json

import pytest

from jaxft.data import read_rows
from jaxft.data.rows import BadRow
from jaxft.errors import DataError

ROWS = [{"text": "one, two"}, {"text": "línea\u2028中文"}, {"text": 'say "hi"\nbye'}]


def write(path, kind):
    if kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    elif kind.startswith("jsonl"):
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).replace("\n\n", "\r\n\n", 1)
        raw = ("\ufeff" + text).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif kind == "csv":
        path.write_text(
            "text\n" + "".join('"{}"\n'.format(r["text"].replace('"', '""')) for r in ROWS), encoding="utf-8"
        )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet"])
def test_each_kind_of_file(tmp_path, kind):
    rows = read_rows(write(tmp_path / f"rows.{kind}", kind))
    assert [row.fields for row in rows] == ROWS
    assert "rows." + kind in rows[1].place


def test_places_are_lines_of_the_file(tmp_path):
    jsonl, table = write(tmp_path / "a.jsonl", "jsonl"), write(tmp_path / "a.csv", "csv")
    assert [r.place.rsplit(":", 1)[1] for r in read_rows(jsonl)] == ["1", "3", "5"]
    assert [r.place.rsplit(":", 1)[1] for r in read_rows(table)] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", ', "not valid JSON"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        ("[1, 2]", "a JSON object is expected"),
        ("null", "a JSON object is expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n" + '{"text": "good"}\n')
    rows = read_rows(file)
    assert len(rows) == 3
    assert isinstance(rows[1], BadRow)
    assert str(rows[1]).startswith(f"{file}:2: ")
    assert reason in rows[1].reason


def test_a_csv_row_of_another_width_is_named(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\na,b\nc\n")
    assert str(read_rows(file)[1]).startswith(f"{file}:3: 1 cells under 2 columns")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "the file is empty"),
        ("rows.jsonl", b"\n \n", "no row in it"),
        ("rows.json", b"[]", "no row in it"),
        ("rows.json", b"  ", "no row in it"),
        ("rows.csv", b"text\n", "no row in it"),
        ("rows.csv", b"text,text\na,b\n", "the column 'text' stands twice"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "rows.jsonl:2: not UTF-8"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.json", b'[{"text": "a"},\n {"text": ]', "rows.json:2: not valid JSON"),
        ("rows.parquet", b"PAR1 and nothing", "a Parquet file that cannot be read"),
        ("rows.json", b'[{"text": "a", "text": "b"}]', "the key 'text' stands twice"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-12] + b"\x00" * 12, "cannot be read"),
        ("rows.txt", b"hello", "a file of no kind that is read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_what_is_no_file(tmp_path):
    with pytest.raises(DataError, match="this is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


def test_a_name_goes_to_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("someone/some-data", split="validation")
    assert asked == [("someone/some-data", "validation")]
    assert [row.fields for row in rows] == ROWS
    assert rows[0].place == "someone/some-data: row 1"

    def refuses(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuses)
    with pytest.raises(DataError, match=r"someone/other: no such file here, and the hub gave no data set.*offline"):
        read_rows("someone/other")
