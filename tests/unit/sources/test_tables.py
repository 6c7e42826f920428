"""Tables of all kinds give the same rows, and say what is wrong with them."""

import json

import pytest

from layerwise.errors import DataError
from layerwise.sources.tables import read_rows

ROWS = [{"text": 'a "quoted", one', "label": "x"}, {"text": "zwei\nZeilen ä", "label": "y"}]


def written(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    if suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_all_formats_give_the_same_rows(tmp_path, suffix):
    assert read_rows(written(tmp_path, suffix), ["text", "label"]) == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_names_those_there_are(tmp_path, suffix):
    with pytest.raises(
        DataError, match=r"no column 'texts'; its columns are 'text', 'label'. Did you mean 'text'"
    ):
        read_rows(written(tmp_path, suffix), ["texts"])


@pytest.mark.parametrize(
    ("suffix", "delimiter"), [(".csv", ";"), (".csv", "\t"), (".csv", "|"), (".tsv", ";")]
)
def test_the_delimiter_of_the_column_names_is_taken(tmp_path, suffix, delimiter):
    # A table whose line of names has another delimiter alone is read with that, commas in cells and all.
    path = tmp_path / f"t{suffix}"
    path.write_text(f'"text"{delimiter}label\n"a, b"{delimiter}x\n', encoding="utf-8-sig")
    assert read_rows(path, ["text", "label"]) == [{"text": "a, b", "label": "x"}]


def test_the_same_name_is_not_suggested_twice(tmp_path):
    # Two missing columns that resemble one column give one suggestion.
    path = tmp_path / "t.csv"
    path.write_text("labels,x\na,b\n")
    with pytest.raises(DataError) as error:
        read_rows(path, ["label", "label2"])
    assert str(error.value).count("Did you mean") == 1


def test_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "w.csv"
    path.write_bytes("text,label\nplain,a\nfür,b\n".encode("cp1252"))
    with pytest.raises(
        DataError,
        match=r"not utf-8: line 3 has the byte 0xfc. Save it .* fit and .*--encoding cp1252 \(encod",
    ):
        read_rows(path)
    assert read_rows(path, encoding="cp1252")[1]["text"] == "für"
    path.write_bytes("text,label\nä,b\n".encode("utf-16"))
    with pytest.raises(DataError, match="encoding='utf-16'"):
        read_rows(path)
    with pytest.raises(DataError, match="encoding 'utf8000' is not known"):
        read_rows(path, encoding="utf8000")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_with_nothing_in_it_is_called_empty(tmp_path, name):
    # Its columns are not what is wrong.
    (tmp_path / name).write_text("\n")
    with pytest.raises(DataError, match=rf"{name}' is empty; expected"):
        read_rows(tmp_path / name, {"path": "--path-column"})


def test_an_empty_line_is_no_row(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n\n3,4\n")
    assert read_rows(tmp_path / "t.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2\n1,2,3\n1\n", "line 3 has 3 cells, line 4 has 1 cell"),
        ("b.csv", 'a,b\n"open,2\n', "malformed"),
        ("c.csv", "a,a\n1,2\n", "two columns of one name"),
        ("d.csv", "a,b\n", "no rows"),
        ("e.csv", "", "is empty"),
        ("f.jsonl", '{"a": 1}\nnope\n', "line 2"),
        ("g.jsonl", '{"a": 1}\n3\n', "line 2 is an int"),
        ("h.json", "[1, 2", "not JSON"),
        ("deep.json", "[" * 100_000, "not JSON: .*recursion"),
        ("deep.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, "not JSON lines: line 2: .*recursion"),
        ("long.json", f'[{{"a": {"1" * 5000}}}]', "not JSON: .*4300 digits"),
        ("long.jsonl", f'{{"a": {"1" * 5000}}}', "not JSON lines: line 1: .*4300 digits"),
        ("i.parquet", "PAR1", "not a whole Parquet file"),
        ("j.xlsx", "x", "ends in '.xlsx'; expected one of .csv"),
    ],
)
def test_malformed_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_missing_table_names_a_neighbour(tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"Did you mean 'train\.csv'"):
        read_rows(tmp_path / "trian.csv")


def test_long_cells_are_read_and_the_limit_of_csv_is_left_as_it_was(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "l.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read_rows(tmp_path / "l.csv")[0]["text"]) == 300_000
    assert csv.field_size_limit() == before


def test_a_folder_named_like_a_table_is_told_as_one(tmp_path):
    # It does exist, so nothing like it is proposed.
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match=r"d\.csv' is a folder; expected a file\.$"):
        read_rows(tmp_path / "d.csv")
