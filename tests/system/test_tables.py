"""Tables of pictures and captions: every usable row is a pair, the others are counted."""

from __future__ import annotations

import base64
import json
import pickle

import numpy as np
import pytest

from dalle.cli import main
from dalle.data import sources
from dalle.data.pairs import all_captions, fingerprints
from dalle.data.split import hold_out
from dalle.data.tables import TablePairs
from dalle.errors import DataError, EnvironmentProblem
from support.pictures import JPEG, PNG
from support.shards import picture


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "broken.png").write_bytes(b"broken")
    return tmp_path


def write_csv(path, delimiter=","):
    rows = [
        ["File_Name", "id", "Caption"],
        ["pictures/0.png", "0", "zero"],
        ["pictures/1.png", "1", '"one, in ""quotes""\nand on two lines"'],
        ["pictures/2.png", "2", '" "'],
        ["pictures/none.png", "3", "not there"],
        ["broken.png", "4", "broken"],
        ["", "5", "no name"],
        ["https://example.org/5.png", "6", "a URL"],
        ["pictures/3.png", "7"],
        [str(path.parent / "pictures" / "4.png"), "8", "von überall"],
        [],
        ["pictures/5.png", "9", "five"],
    ]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


LEFT_OUT = {
    "caption is empty": 1, "not a file": 1, "not a picture": 1, "row without picture": 1,
    "picture is a URL": 1, "row is too short": 1,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_csv(folder, suffix):
    path = write_csv(folder / f"table{suffix}", "\t" if suffix == ".tsv" else ",")
    pairs = sources.load_pairs(str(path), image_size=8)
    assert isinstance(pairs, TablePairs) and dict(pairs.skipped) == LEFT_OUT
    captions = ["zero", 'one, in "quotes"', "and on two lines", "von überall", "five"]
    assert all_captions(pairs) == captions and pairs.number_of_captions() == 5
    assert dict(pairs.several) == {1: captions[1:3]}
    assert len(pairs.problems) == 5 and all("\n" not in line for line in pairs.problems)
    for i, number in enumerate((0, 1, 4, 5)):
        assert pairs.read_bytes(i)[0] == picture(number)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pairs)).load(3), pairs.load(3))
    first = fingerprints(pairs)
    (folder / "pictures" / "5.png").write_bytes(picture(9))
    assert fingerprints(TablePairs(path))["pictures"] != first["pictures"]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="table.*: row 11: row must be as it was, got: table has"):
        pairs.load(3)


def test_a_csv_with_pictures_in_base64(folder):
    content = [picture(0), b"\xff\xd8" + bytes(150_000), picture(1)]  # longer than csv's own limit
    rows = [f'{base64.b64encode(data).decode()},"number ""{i}"""' for i, data in enumerate(content)]
    (folder / "b.csv").write_text("\n".join(["PNG,text", *rows, "@@,no base64", ",no bytes"]))
    pairs = TablePairs(folder / "b.csv")
    assert list(pairs.captions) == ['number "0"', 'number "2"']
    assert [pairs.read_bytes(i)[0] for i in range(2)] == [content[0], content[2]]
    assert dict(pairs.skipped) == {
        "not a picture": 1, "bytes are no base64": 1, "empty file": 1,
    }  # fmt: skip
    (folder / "size.csv").write_text("bytes,path,text\n77,pictures/0.png,a name counts\n")
    assert TablePairs(folder / "size.csv").read_bytes(0)[0] == picture(0)


@pytest.mark.parametrize("end", ["", "\n", '""\n', "\r\n"])
def test_a_quote_that_is_never_closed_makes_no_pair(folder, end):
    """All rows behind it would be its caption."""
    rows = 'file,text\npictures/0.png,"one\ntwo"\npictures/1.png,"three\npictures/2.png,four'
    (folder / "open.csv").write_bytes((rows + end).encode())
    pairs = TablePairs(folder / "open.csv")
    assert all_captions(pairs) == ["one", "two"]
    assert dict(pairs.skipped) == {"quote is never closed": 1}
    (folder / "closed.csv").write_bytes(f'{rows}"{end}'.encode())
    assert len(TablePairs(folder / "closed.csv")) == 2


def test_json_lines(folder):
    rows = [
        {"image": "pictures/0.png", "caption": "zero"},
        {"image": "pictures/1.png", "captions": ["one", "eins\nuno"]},
        {"bytes": base64.b64encode(PNG).decode(), "text": "of bytes"},
        {"bytes": "no base64!", "text": "of bytes"},
        {"image": "pictures/2.png"},
        {"image": 5, "text": "a number"},
        {"image": "pictures/\0.png", "text": "a NUL"},
    ]
    lines = [json.dumps(row) for row in rows]
    lines[4:4] = ["{broken", "[1]", ""]
    path = folder / "table.jsonl"
    path.write_text("\n".join(lines) + "\n")
    pairs = sources.load_pairs(str(path), image_size=8)
    assert all_captions(pairs) == ["zero", "one", "eins", "uno", "of bytes"]
    assert dict(pairs.skipped) == {
        "bytes are no base64": 1, "row is no JSON": 1, "row is no JSON object": 1,
        "row without caption": 1, "row without picture": 1, "not a file": 1,
    }  # fmt: skip
    assert pairs.read_bytes(2)[0] == PNG and pairs.load(2).shape == (24, 40, 3)


def test_parquet(folder, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name, columns, **options):
        parquet.write_table(pyarrow.table(columns), folder / name, **options)
        return folder / name

    captions = ["zero", "one\nuno", "", None, "four", "five"]
    names = [f"pictures/{i}.png" for i in range(6)]
    pairs = TablePairs(write("names.parquet", {"path": names, "TEXT": captions}))
    assert all_captions(pairs) == ["zero", "one", "uno", "four", "five"]
    assert dict(pairs.skipped) == {"caption is empty": 1, "row without caption": 1}
    assert capsys.readouterr().err == ""
    content = [picture(i) for i in range(5)] + [b"broken"]
    raw = write("bytes.parquet", {"image": content, "text": captions}, row_group_size=2)
    pairs = TablePairs(raw)
    assert "a picture is read with its whole row group" in capsys.readouterr().err
    assert [pairs.read_bytes(i)[0] for i in (2, 0, 1)] == [picture(4), picture(0), picture(1)]
    assert pairs.skipped["not a picture"] == 1
    assert pickle.loads(pickle.dumps(pairs)).captions[2] == "four"
    nested = [{"bytes": JPEG, "path": None}, {"bytes": None, "path": "pictures/1.png"}]
    pairs = TablePairs(write("hf.parquet", {"image": nested, "captions": [["a", "b"], ["c"]]}))
    assert all_captions(pairs) == ["a", "b", "c"] and pairs.read_bytes(1)[0] == picture(1)
    with pytest.raises(DataError, match=r"must have a column of captions \(caption, .*got url, im"):
        TablePairs(write("none.parquet", {"url": ["x"], "image": [b"y"]}))
    (folder / "cut.parquet").write_bytes(raw.read_bytes()[:100])
    with pytest.raises(DataError, match="cut.parquet must be a readable table, got: no parquet"):
        TablePairs(folder / "cut.parquet")


def test_bad_tables_get_one_line(folder, monkeypatch, capsys):
    cases = {
        "empty.csv": (b"", r"must have a column of pictures \(file_name, .*\), got none$"),
        "one.csv": (b"path,caption\n", r"must hold a usable row, got none \(the table is empty\)$"),
        "columns.csv": (b"url,caption\nx,y\n", r"must have a column of pictures .*, got url, cap"),
        "uncaptioned.tsv": (b"path\turl\nx\ty\n", "must have a column of captions .*, got path, u"),
        "blank.csv": (b"path,caption\nbroken.png,\n", r"got none \(1 x caption is empty\)$"),
        "latin.csv": (b"path,caf\xe9\n", "must be a table in UTF-8, got: byte 8 is not UTF-8"),
        "row.csv": (b"path,text\nbroken.png,caf\xe9\n", "1 x caption is not UTF-8"),
        "empty.jsonl": (b"", r"\(the table is empty\)$"),
        "keys.jsonl": (
            b'{"url": "x", "caption": "y"}\n',
            "column of pictures .*, got caption, url",
        ),
        "texts.jsonl": (b'{"image": "x", "alt": "y"}\n', "column of captions .*, got alt, image"),
    }
    for name, (content, message) in cases.items():
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            TablePairs(folder / name)
        assert "\n" not in str(caught.value), name
    assert main(["tokenizer", "train", "--data", str(folder / "columns.csv"), "--out", "x"]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr("dalle.data.source.find_spec", lambda name: None)
    (folder / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(EnvironmentProblem, match="package pyarrow must be installed, got none; ty"):
        TablePairs(folder / "x.parquet")


def test_a_table_holds_out_what_its_folder_does(folder):
    for i in range(6, 30):
        (folder / "pictures" / f"{i}.png").write_bytes(picture(i))
    rows = [f"pictures/{i}.png,{i}" for i in range(30)]
    (folder / "all.csv").write_text("\n".join(["path,caption", *rows]))
    pairs = TablePairs(folder / "all.csv")
    for i in range(30):
        (folder / "pictures" / f"{i}.txt").write_text(str(i))
    plain = sources.load_pairs(str(folder / "pictures"), image_size=8)
    held = [[part.captions[i] for i in range(len(part))] for part in hold_out(pairs, 0.2)]
    assert [sorted(part) for part in held] == [sorted(p.captions) for p in hold_out(plain, 0.2)]
