"""Tables of texts are read, checked and split; everything wrong with them is named at once."""

import csv
import json

import pytest

from layerwise.errors import DataError
from layerwise.sources.texttable import read_texts

TAGS = "token_classification"


def write_csv(path, rows, columns=("text", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def topics(count=10):
    return [(f"text {number} of {name}", name) for name in ("cats", "dogs") for number in range(count)]


def test_one_table_is_split_with_equal_shares(tmp_path):
    table = read_texts(write_csv(tmp_path / "t.csv", topics()), val_frac=0.2, test_frac=0.1, seed=1)
    assert {name: len(part) for name, part in table.parts.items()} == {"train": 14, "val": 4, "test": 2}
    assert table.classes == ("cats", "dogs")
    assert sorted(table.parts["val"].targets) == ["cats"] * 2 + ["dogs"] * 2
    texts = [text for part in table.parts.values() for text in part.texts]
    assert sorted(texts) == sorted(text for text, _ in topics())
    again = read_texts(tmp_path / "t.csv", val_frac=0.2, test_frac=0.1, seed=1)
    other = read_texts(tmp_path / "t.csv", val_frac=0.2, test_frac=0.1, seed=2)
    assert again.parts["val"].texts == table.parts["val"].texts != other.parts["val"].texts
    assert "val: 4 rows split off from train, stratified, seed 1" in table.notes


def test_files_for_the_parts_are_used_as_they_are(tmp_path):
    train = write_csv(tmp_path / "a.tsv", topics(3))
    val = write_csv(tmp_path / "b.csv", topics(2))
    table = read_texts(train, val=val, val_frac=0.5)
    assert [len(part) for part in table.parts.values()] == [6, 4]


def test_a_folder_of_tables(tmp_path):
    write_csv(tmp_path / "train.csv", topics(3))
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "x", "label": "cats"}])
    (tmp_path / "README.md").write_text("where these come from")
    table = read_texts(tmp_path)
    assert [len(part) for part in table.parts.values()] == [6, 1]
    write_csv(tmp_path / "held_out.csv", topics(1))
    assert "'held_out.csv' beside the tables of the parts was left out" in read_texts(tmp_path).notes
    with pytest.raises(DataError, match=r"has a val part of its own, and .*train\.csv' is given too"):
        read_texts(tmp_path, val=tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"split_column is 'part', but the parts \(val, train\)"):
        read_texts(tmp_path, split_column="part")
    write_csv(tmp_path / "valid.tsv", topics(1))
    with pytest.raises(DataError, match=r"two tables for val: dev\.jsonl, valid\.tsv"):
        read_texts(tmp_path)


def test_a_split_column(tmp_path):
    rows = [
        (text, label, "dev" if text.endswith("s") and " 1 " in text else "train") for text, label in topics(4)
    ]
    path = write_csv(tmp_path / "t.csv", rows, ("text", "label", "part"))
    table = read_texts(path, split_column="part")
    assert [len(part) for part in table.parts.values()] == [6, 2]
    with pytest.raises(DataError, match=r"no column 'split'.*'text', 'label', 'part'"):
        read_texts(path, split_column="split")
    with pytest.raises(
        DataError, match=r"(?s)row 1 has 'cats' in 'label'; expected train, val or test.*--split-column"
    ):
        read_texts(path, split_column="label")
    write_csv(path, [("x", "cats", "val"), ("y", "dogs", "test")], ("text", "label", "part"))
    with pytest.raises(DataError, match=r"has no training rows \(parts: val, test\)"):
        read_texts(path, split_column="part")


def test_groups_stay_on_one_side(tmp_path):
    rows = [(f"{label} {group} {n}", label, group) for label in "ab" for group in range(8) for n in range(3)]
    path = write_csv(tmp_path / "t.csv", rows, ("text", "label", "author"))
    table = read_texts(path, group_column="author", val_frac=0.25)
    sides = [set(part.groups) for part in table.parts.values()]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2


def test_datasets_folders_and_their_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "never"])}
    )
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"] * 4, "label": [0, 1, 1] * 4}, features=features
    )
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path / "both"))
    table = read_texts(tmp_path / "both")
    assert table.classes == ("neg", "pos")
    assert table.parts["val"].targets[:3] == ["neg", "pos", "pos"]
    made.save_to_disk(str(tmp_path / "one"))
    assert len(read_texts(tmp_path / "one", val_frac=0.25).parts["train"]) == 9


def test_splits_of_other_names_are_told(tmp_path):
    # MNLI's matched validation is val; what is left out is named; a part without any label is no part.
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    parts = {
        name: datasets.Dataset.from_dict({"text": [text] * 4, "label": labels}, features=features)
        for name, text, labels in (
            ("train", "a", [0, 1] * 2),
            ("validation_mismatched", "b", [0, 1] * 2),
            ("validation_matched", "c", [0, 1] * 2),
            ("test_matched", "d", [-1] * 4),
        )
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "mnli"))
    table = read_texts(tmp_path / "mnli", skip_bad_rows=True)
    assert {name: part.texts for name, part in table.parts.items()} == {"train": ["a"] * 4, "val": ["c"] * 4}
    told = " | ".join(table.notes)
    assert "val: the split 'validation_matched'" in told
    assert "split 'validation_mismatched' of" in told
    assert "test: none of its rows can be used" in told


def test_labels_that_are_numbers_stand_in_their_order(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "x", "label": n} for n in (10, 9, 2) * 3])
    assert read_texts(path).classes == ("2", "9", "10")


def test_labels_that_are_nearly_numbers_have_one_order(tmp_path):
    # Labels of one value stand in one order in every process, and "--5" is a name.
    path = write_csv(tmp_path / "t.csv", [("x", name) for name in ("7", "007", "07", "-1", "10") * 3])
    assert read_texts(path, val_frac=0).classes == ("-1", "007", "07", "7", "10")
    path = write_csv(tmp_path / "t.csv", [("x", name) for name in ("--5", "5") * 3])
    assert read_texts(path, val_frac=0).classes == ("--5", "5")


def test_words_of_conll_are_what_stands_between_blanks_and_tabs(tmp_path):
    # A byte-order mark, a no-break space and U+2028 neither join nor split words.
    path = tmp_path / "t.conll"
    path.write_bytes("\ufeffAda\tB\r\n10\u00a0000 \tO\r\na\u2028b O\r\n\r\nBonn B\n".encode())
    table = read_texts(path, task="token_classification", val_frac=0)
    assert table.parts["train"].words == [["Ada", "10\u00a0000", "a\u2028b"], ["Bonn"]]
    assert table.parts["train"].targets == [("B", "O", "O"), ("B",)]
    with pytest.raises(DataError, match="encoding 'utf-9' is not known"):
        read_texts(path, task="token_classification", encoding="utf-9")
    path.write_bytes("für O\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not utf-8: line 1.*encoding="):
        read_texts(path, task="token_classification")


@pytest.mark.parametrize(
    ("text", "message"),
    [("A B\nword\n", "line 2 of .* is 'word'; expected a word and its tag"), ("\n\n", "no sentences")],
)
def test_conll_files_that_are_none(tmp_path, text, message):
    (tmp_path / "t.conll").write_text(text)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "t.conll", task=TAGS)


def test_a_damaged_folder_of_datasets(tmp_path):
    # what datasets says of it is told, with one full stop
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read by datasets \(.*[^.]\)\.$"):
        read_texts(tmp_path)


def test_pairs(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("a", "b", "x"), ("c", "d", "y")] * 3, ("one", "two", "label"))
    table = read_texts(path, text_column="one", pair_column="two", val_frac=0)
    assert table.parts["train"].pairs == ["b", "d"] * 3


def test_several_labels(tmp_path):
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["z"]}]
    table = read_texts(write_jsonl(tmp_path / "t.jsonl", rows), task="multi_label", val_frac=0)
    assert table.classes == ("x", "y", "z")
    assert table.parts["train"].targets == [("x", "y"), (), ("z",)]
    path = write_csv(tmp_path / "t.csv", [("a", "x;y"), ("b", ""), ("c", " z ;x")])
    table = read_texts(path, task="multi_label", label_separator=";", val_frac=0)
    assert table.parts["train"].targets == [("x", "y"), (), ("z", "x")]


@pytest.mark.parametrize(
    ("task", "columns", "cell", "between"),
    [
        ("multi_label", ("text", "label"), "['x', 'y']", "';'"),
        ("multi_label", ("text", "label"), '["x"]', "';'"),
        ("multi_label", ("text", "label"), "[]", "';'"),
        (TAGS, ("tokens", "tags"), "[0, 3]", "blanks"),
        (TAGS, ("tokens", "tags"), "['O' 'B-X']", "blanks"),
    ],
)
def test_a_list_that_was_written_as_text_is_no_name(tmp_path, task, columns, cell, between):
    # as pandas and datasets write lists to CSV; "['x'" would be learned as a class
    path = write_csv(tmp_path / "t.csv", [("a b", cell)], columns)
    with pytest.raises(DataError, match=rf"row 1 of train has the list .* as text; .*joined by {between}"):
        read_texts(path, task=task, label_separator=";")


def test_names_in_brackets_are_names(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("a", "[x];[y]"), ("b", "[y]")])
    table = read_texts(path, task="multi_label", label_separator=";", val_frac=0)
    assert table.classes == ("[x]", "[y]")


def test_numbers(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("a", "1.5"), ("b", "-2")])
    assert read_texts(path, task="regression", val_frac=0).parts["train"].targets == [1.5, -2.0]
    write_csv(path, [("a", "1.5"), ("b", "many"), ("c", "nan")])
    with pytest.raises(DataError, match=r"row 2 of train has 'many' as label(?s:.*)row 3 .*finite"):
        read_texts(path, task="regression")


def test_tags_from_conll_and_from_lists(tmp_path):
    (tmp_path / "t.conll").write_text(
        "-DOCSTART- O\n\nAda N B-PER\nslept V O\n\nBonn N B-LOC\n", encoding="utf-8"
    )
    table = read_texts(tmp_path / "t.conll", task="token_classification", val_frac=0)
    assert table.parts["train"].words == [["Ada", "slept"], ["Bonn"]]
    assert table.parts["train"].targets == [("B-PER", "O"), ("B-LOC",)]
    assert table.classes == ("B-LOC", "B-PER", "O")
    path = write_jsonl(tmp_path / "t.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(DataError, match="row 1 of train has 2 words and 1 tag\n"):
        read_texts(path, task="token_classification")


def test_instructions_are_prompts_with_a_template(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("add 1 1", "2")] * 4, ("prompt", "answer"))
    table = read_texts(
        path,
        task="causal_lm",
        text_column="prompt",
        response_column="answer",
        prompt_template="Q: {prompt}\nA: ",
        val_frac=0,
    )
    assert table.parts["train"].texts[0] == "Q: add 1 1\nA: "
    assert table.parts["train"].responses[0] == "2"
    with pytest.raises(DataError, match=r"expected \{prompt\} in it"):
        read_texts(path, task="causal_lm", response_column="answer", prompt_template="Q:")
    with pytest.raises(DataError, match="response_column is for task 'causal_lm'"):
        read_texts(path, response_column="answer")


def test_missing_columns_name_those_there_are(tmp_path):
    path = write_csv(tmp_path / "t.csv", topics(), ("texts", "topic"))
    with pytest.raises(DataError, match=r"no column 'text', 'label'; its columns are 'texts', 'topic'"):
        read_texts(path)
    write_csv(tmp_path / "v.csv", topics(), ("text", "label"))
    with pytest.raises(DataError, match=r"\(val\) has no column 'texts', 'topic'"):
        read_texts(path, val=tmp_path / "v.csv", text_column="texts", label_column="topic")


def test_bad_rows_are_all_named_or_left_out(tmp_path):
    rows = [*topics(3), ("", "cats"), ("  ", "dogs"), ("text", ""), ("x" * 1_000_001, "cats")]
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(DataError) as caught:
        read_texts(path)
    text = str(caught.value)
    for part in (
        "4 of 10 rows cannot be used",
        "row 7 of train has an empty 'text'",
        "row 8 of train has an empty 'text'",
        "row 9 of train has no label",
        "row 10 of train has 1,000,001 characters in 'text'; expected at most 1,000,000",
        "skip_bad_rows=True",
    ):
        assert part in text
    table = read_texts(path, skip_bad_rows=True, val_frac=0)
    assert len(table.parts["train"]) == 6
    assert [row for row, _ in table.skipped] == [f"row {number} of train" for number in (7, 8, 9, 10)]


def test_rows_that_are_all_left_out_are_named(tmp_path):
    # else nobody would know why there is nothing to train on
    path = write_csv(tmp_path / "t.csv", [("x", ""), ("", "cats")])
    with pytest.raises(DataError, match=r"(?s)no training row .*row 1 of train has no label.*row 2 of train"):
        read_texts(path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (TAGS, {"tokens": 5, "tags": ["A"]}, "no list of words in 'tokens'"),
        (TAGS, {"tokens": [], "tags": []}, "an empty 'tokens'"),
        (TAGS, {"tokens": ["a"], "tags": 7}, "7 as labels; expected a list or a text"),
        ("multi_label", {"text": "x", "label": 5}, "5 as labels; expected a list or a text"),
        ("text_classification", {"text": ["x"], "label": "a"}, "a list in 'text'; expected a text"),
        ("text_classification", {"text": "x", "label": ["a"]}, "a list as label; expected one .*multi_label"),
    ],
)
def test_cells_of_another_kind_are_named(tmp_path, task, row, reason):
    path = write_jsonl(tmp_path / "t.jsonl", [row])
    with pytest.raises(DataError, match=f"row 1 of train has {reason}"):
        read_texts(path, task=task)


def test_all_rows_of_no_part_are_named(tmp_path):
    rows = [("a", "x", "train"), ("b", "y", "hold"), ("c", "x", "val"), ("d", "y", "")]
    path = write_csv(tmp_path / "t.csv", rows, ("text", "label", "part"))
    with pytest.raises(DataError, match=r"(?s)2 of 4 rows .*row 2 has 'hold' in 'part'.*row 4 has ''"):
        read_texts(path, split_column="part")


def test_numbers_are_texts_and_nothing_is_no_label(tmp_path):
    # a column of numbers that are meant as text; an empty cell among several labels
    rows = [{"text": 5, "label": ["a"]}, {"text": 2.5, "label": None}, {"text": "x", "label": "a,b"}]
    table = read_texts(write_jsonl(tmp_path / "t.jsonl", rows), task="multi_label", val_frac=0)
    assert table.parts["train"].texts == ["5", "2.5", "x"]
    assert table.parts["train"].targets == [("a",), (), ("a", "b")]
    write_jsonl(tmp_path / "t.jsonl", [{"text": "x", "label": None}])
    with pytest.raises(DataError, match="no training row has a label"):
        read_texts(tmp_path / "t.jsonl", task="multi_label")


def test_a_split_by_group_that_takes_a_class_away_is_refused(tmp_path):
    # each class in one document: whichever goes to validation, training has not seen its class
    rows = [(f"{label} {n}", label, label) for label in "ab" for n in range(3)]
    path = write_csv(tmp_path / "t.csv", rows, ("text", "label", "doc"))
    with pytest.raises(DataError, match=r"no training row is left of '[ab]'.*at least two groups of each"):
        read_texts(path, group_column="doc", val_frac=0.5)


def test_a_single_text_of_ten_megabytes(tmp_path):
    path = write_csv(tmp_path / "t.csv", [*topics(), ("x" * 10_000_000, "cats")])
    with pytest.raises(DataError, match="has 10,000,000 characters"):
        read_texts(path)


def test_labels_of_val_that_train_has_not(tmp_path):
    train = write_csv(tmp_path / "a.csv", topics())
    val = write_csv(tmp_path / "b.csv", [("x", "dog"), ("y", "owl"), ("z", "cats")])
    with pytest.raises(DataError) as caught:
        read_texts(train, val=val)
    assert "label 'dog' is in val and never in train. Did you mean 'dogs'" in str(caught.value)
    assert "label 'owl' is in val and never in train" in str(caught.value)


def test_a_split_at_random_leaves_training_every_label(tmp_path):
    # It does not look at labels, so a row with the only one of its kind goes back.
    rows = [("a", label) for label in ("x", "y", "x, y", "") * 6] + [("c", "rare")]
    path = write_csv(tmp_path / "t.csv", rows)
    (tmp_path / "t.conll").write_text("\n".join(["a X", ""] * 12 + ["c RARE", ""]))
    for file, task, rare in ((path, "multi_label", "rare"), (tmp_path / "t.conll", TAGS, "RARE")):
        for seed in range(12):
            table = read_texts(file, task=task, seed=seed)
            assert any(rare in row for row in table.parts["train"].targets)
            assert any(", at random, seed" in note for note in table.notes)


def test_labels_without_a_separator_are_refused(tmp_path):
    path = write_csv(tmp_path / "t.csv", topics())
    with pytest.raises(DataError, match="label_separator is empty"):
        read_texts(path, task="multi_label", label_separator="")


def test_numbers_and_groups_that_are_none_are_bad_rows(tmp_path):
    # An integer of 400 digits is no float, and a list cannot tell rows apart.
    rows = [{"text": f"text {number}", "label": number, "by": str(number)} for number in range(9)]
    path = write_jsonl(tmp_path / "t.jsonl", [*rows, {"text": "x", "label": 10**400, "by": "a"}])
    with pytest.raises(DataError, match=r"1 of 10 rows .*\n.*row 10 of train has 10+ as label; expected"):
        read_texts(path, task="regression")
    path = write_jsonl(tmp_path / "t.jsonl", [*rows, {"text": "x", "label": 1, "by": ["a", "b"]}])
    with pytest.raises(DataError, match=r"1 of 10 rows .*\n.*row 10 of train has a list in 'by'"):
        read_texts(path, task="regression", group_column="by")


def test_one_class_is_no_task(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("x", "same")] * 5)
    for task in ("text_classification", "multi_label"):
        with pytest.raises(DataError, match=r"one class \('same'\)"):
            read_texts(path, task=task)
    path = tmp_path / "t.conll"
    path.write_text("only O\nsuch O\n\n" * 5)
    with pytest.raises(DataError, match=r"one class \('O'\)"):
        read_texts(path, task="token_classification")


def test_sources_that_are_none(tmp_path):
    write_csv(tmp_path / "data.csv", topics())
    with pytest.raises(DataError, match=r"does not exist\. Did you mean 'data\.csv'"):
        read_texts(tmp_path / "dat.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train table \(it holds nothing\)"):
        read_texts(tmp_path / "empty")
    with pytest.raises(DataError, match="task is 'classify'; expected one of text_classification"):
        read_texts(tmp_path / "data.csv", task="classify")


def test_wrong_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\nfür,a\nx,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not utf-8: line 2.*encoding="):
        read_texts(tmp_path / "t.csv")
    assert read_texts(tmp_path / "t.csv", encoding="latin-1", val_frac=0).parts["train"].texts[0] == "für"


def test_a_hub_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"'hf:imdb@plain' cannot be opened \(no route to host\).*a folder or a table"
    ):
        read_texts("hf:imdb@plain")


def test_a_hub_data_set_without_training_part(monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict({"unsupervised": datasets.Dataset.from_dict({"text": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: made)
    with pytest.raises(DataError, match="has the splits unsupervised; expected train"):
        read_texts("hf:imdb")
