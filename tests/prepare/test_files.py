"""Files as people have them: every kind, encoding and table is read; no other file is opened."""

import gzip
import io
import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from altered.data_folders import SHEET, workbook
from athanor.paths import SPLITS
from athanor.prepare import origins
from athanor.prepare.demo import demo_note
from athanor.prepare.folder import list_files
from athanor.prepare.records import Record
from athanor.prepare.streams import Limits
from support.refused import refused

LIMITS = Limits(row=20_000, file=300_000)
FIXES = frozenset({"encoding", "delimiter", "byte_order_mark"})
# Without the time, so that the names of tests are the same in each of xdist's processes.
compress = partial(gzip.compress, mtime=0)
ROW = {"prompt": "月亮的光是什么", "completion": "是太阳的光"}
LINE = json.dumps(ROW, ensure_ascii=False)
TABLE = "prompt,completion\n月亮的光是什么,是太阳的光\n"


def cells(*rows: str) -> str:
    """A sheet whose rows are cells as XML, each with its place left out."""
    body = "".join(f"<row>{row}</row>" for row in rows)
    return f"{SHEET}<sheetData>{body}</sheetData></worksheet>"


def texts(*values: str) -> str:
    return "".join(f'<c t="inlineStr"><is><t>{value}</t></is></c>' for value in values)


def parquet_of(**columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


Read = Callable[[str, bytes | str], list[Record]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a file of this name and content as prepare does."""

    def records(name: str, content: bytes | str) -> list[Record]:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        [origin], skipped = origins.find_files(folder, len, 100, [], LIMITS)
        assert not skipped
        origin.lines()
        return list(origin.read(FIXES))

    return records


GZ = compress(LINE.encode())
SPREADSHEET = cells(
    texts("prompt", "completion", "", ""),
    texts("月亮的光是什么", "是太阳的光", "", ""),
    texts("", "", "", ""),
)
READ: list[tuple[str, bytes | str]] = [
    ("rows.ndjson", f"{LINE}\n\n"),
    ("rows.JSONL", LINE),
    ("rows.jsonl", f"{LINE}\r\n"),
    ("rows.jsonl", f"{LINE}\r"),
    ("rows.jsonl.gz", GZ),
    ("rows.jsonl.GZ", GZ + b"\0" * 20),
    ("rows.jsonl.gz", compress(LINE[:9].encode()) + compress(LINE[9:].encode())),
    ("rows.json.gz", compress(f"[{LINE}]".encode())),
    ("rows.csv.gz", compress(TABLE.encode())),
    (
        "rows.parquet.gz",
        compress(parquet_of(prompt=[ROW["prompt"]], completion=[ROW["completion"]])),
    ),
    ("rows.tsv", TABLE.replace(",", "\t")),
    ("rows.csv", TABLE.replace(",", ";")),
    ("rows.csv", TABLE.replace(",", "\t")),
    ("rows.csv", TABLE.replace(",", "|")),
    ("rows.csv", "sep=;\n" + TABLE.replace(",", ";")),
    ("rows.csv", "sep=,\n" + TABLE),
    ("rows.csv", TABLE.replace("\n", "\r")),
    ("rows.csv", TABLE.replace("\n", ",,\r\n") + ",,,\r\n"),
    ("rows.csv", ",,\n" + "".join(f",{row},\n" for row in TABLE.splitlines())),
    ("rows.csv", "prompt,completion,,\n" + TABLE.splitlines()[1] + "\n,,,,,\n\n"),
    ("rows.tsv", TABLE.replace(",", "\t").replace("\n", "\t\t\n")),
    *(
        (f"rows.{kind}", data.encode(codec))
        for kind, data in (("jsonl", LINE), ("csv", TABLE), ("json", f"[{LINE}]"))
        for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "gb18030")
    ),
    ("rows.csv", ("\ufeff" + TABLE).encode("gb18030")),
    ("rows.csv.gz", compress(TABLE.encode("gb18030"))),
    ("rows.tsv", TABLE.replace(",", "\t").encode("utf-16")),
    ("rows.xlsx", workbook(SPREADSHEET)),
    ("rows.xlsx", workbook(SPREADSHEET.replace("<sheetData>", "<sheetData><row/><row/>"))),
    ("rows.xlsx.gz", compress(workbook(SPREADSHEET))),
]


@pytest.mark.parametrize(("name", "content"), READ)
def test_the_row_is_read(name: str, content: bytes | str, read: Read) -> None:
    [record] = read(name, content)
    assert (record.value, record.faults) == (ROW, [])


def test_cells_of_a_workbook_are_texts(read: Read) -> None:
    numbers = (
        '<c><v>7</v></c><c><v>7.5</v></c><c t="b"><v>1</v></c><c t="str"><f>A1</f><v>x</v></c>'
    )
    [record] = read("a.xlsx", workbook(cells(texts("a", "b", "c", "d"), numbers)))
    assert record.value == {"a": "7", "b": "7.5", "c": "TRUE", "d": "x"}


@pytest.mark.parametrize("kind", ["txt", "md", "txt.gz", "MD"])
def test_texts_are_articles(kind: str, read: Read) -> None:
    text = b"Chapter one. The egg\nwas hard.\n\n\nA second one.\r\n\r\n" + b"word. " * 60
    records = read(f"book.{kind}", compress(text) if kind.endswith("gz") else text)
    assert records[0].value["path"] == ["book"]
    assert len(records) > 3
    assert "".join("".join(r.value["text"].split()) for r in records) == "".join(
        text.decode().split()
    )


OTHERS = {
    "月亮為什麼會發光？太陽的光。": ["big5"],
    "月はなぜ光る。太陽の光": ["shift_jis", "euc-jp"],
    "달은 왜 빛납니까? 태양의 빛": ["euc-kr", "johab"],
    "Où est le café? Là-bas. Noël": ["latin-1", "cp1252", "mac-roman"],
    "Größe für Mädchen": ["latin-1", "cp850"],
    "Почему луна светит? Вопрос": ["cp1251", "koi8-r", "iso8859-5"],
    "Γιατί λάμπει το φεγγάρι": ["iso8859-7"],
}


@pytest.mark.parametrize(
    ("text", "codec"), [(text, codec) for text in OTHERS for codec in OTHERS[text]]
)
def test_another_encoding_is_no_chinese(text: str, codec: str, read: Read) -> None:
    [record] = read("a.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode(codec))
    assert [fault.name for fault in record.faults] == ["invalid_utf8"]


BIG = "x" * 25_000
DEEP = "[" * 100_000
BROKEN: list[tuple[str, bytes | str, str]] = [
    ("a.jsonl.gz", GZ[:-9], "unreadable_file"),
    ("a.jsonl.gz", GZ + b"garbage", "unreadable_file"),
    ("a.jsonl.gz", LINE, "unreadable_file"),
    ("a.jsonl.gz", compress(b"{}\n" * 200_000), "unreadable_file"),
    ("a.xlsx.gz", compress(b"\0" * 400_000), "unreadable_file"),
    ("a.md", "x" * 400_000, "unreadable_file"),
    ("a.md", "\n" * 200_000, "unreadable_file"),
    ("a.jsonl", b"\xff\xfe" + LINE.encode("utf-16-le")[:-1], "unreadable_file"),
    ("a.xlsx", b"\xd0\xcf\x11\xe0 encrypted", "unreadable_file"),
    ("a.xlsx", workbook(SPREADSHEET)[:-30], "unreadable_file"),
    ("a.xlsx", workbook(SHEET + "<row/>" * 60_000), "unreadable_file"),
    ("a.xlsx", workbook(cells('<c r="A1"/>', '<c r="XFD1048576"/>')), "unreadable_file"),
    (
        "a.xlsx",
        workbook(
            cells(*['<c t="s"><v>0</v></c>'] * 50),
            SHEET.replace("worksheet", "sst") + f"<si><t>{BIG}</t></si></sst>",
        ),
        "unreadable_file",
    ),
    ("a.xlsx", workbook(cells(texts("a", "a"))), "unreadable_file"),
    ("a.xlsx", workbook(cells(texts("a"), texts(BIG))), "too_large"),
    ("a.parquet", parquet_of(text=[BIG]), "too_large"),
    ("a.parquet", parquet_of(text=["y" * 10_000] * 20_000), "unreadable_file"),
    ("a.parquet", parquet_of(text=[["y" * 10_000]] * 20_000), "unreadable_file"),
    ("a.jsonl", f'{{"text": "{BIG}"}}', "too_large"),
    ("a.json", f'[{{"text": "{BIG}"}}]', "too_large"),
    ("a.json", f'[{{"text": "{BIG * 90}"}}]', "too_large"),
    ("a.json", f'{{"text": "{BIG * 90}', "too_large"),
    ("a.csv", f"text\n{BIG}\n", "too_large"),
    ("a.csv", f'text\n"{BIG}\n', "too_large"),
    ("a.tsv", f'text\tlabel\na\t"{BIG}\n', "too_large"),
    ("a.json", DEEP, "invalid_json"),
    ("a.jsonl", DEEP[:19_000], "invalid_json"),
    ("a.csv", "text,,\na,b,c\n", "wrong_columns"),
]


@pytest.mark.parametrize(("name", "content", "check"), BROKEN)
def test_what_is_no_row_is_one_fault(
    name: str, content: bytes | str, check: str, read: Read
) -> None:
    [record] = read(name, content)
    assert [fault.name for fault in record.faults] == [check]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{LINE}\n{{"text": "{BIG}"}}\n{LINE}\n'),
        ("a.json", f'[{LINE},\n{{"text": "{BIG}"}},\n{LINE}]'),
        ("a.csv", TABLE + f'"{BIG}\n{BIG}\na ""quote"" ",x\n' + TABLE.splitlines()[1]),
        ("a.csv", TABLE + f"{BIG},{BIG}\n" + TABLE.splitlines()[1]),
    ],
)
def test_rows_behind_a_large_one_are_read(name: str, content: str, read: Read) -> None:
    before, large, behind = read(name, content)
    assert [before.value, behind.value] == [ROW, ROW]
    assert [fault.name for fault in large.faults] == ["too_large"]


@pytest.mark.parametrize("unit", ["[", "*", ">", "`", "> ", "![", "a**b", "# [", "_a"])
def test_markdown_of_one_character_ends(unit: str, read: Read) -> None:
    """Nothing inside a block is parsed: what is tokenized is counted, not the time."""
    read("a.md", unit * (100_000 // len(unit)))


# ---- the folder


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)
        os.chdir(here)


STRANGE: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": make_socket,
    "which does not exist": lambda path: path.symlink_to("nowhere"),
    "can't be followed": lambda path: path.symlink_to(path.name),
    "leaves the folder, to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "leaves the folder, to /;": lambda path: path.symlink_to("/"),
    "leaves the folder, to /proc;": lambda path: path.symlink_to("/proc"),
    "unpack it": lambda path: path.with_suffix(".zip").write_bytes(b"PK"),
    "save it as .xlsx": lambda path: path.with_suffix(".xls").write_bytes(b""),
    "convert it to .md": lambda path: path.with_suffix(".PDF").write_bytes(b"%PDF"),
}


@pytest.mark.parametrize("reason", STRANGE)
def test_what_is_no_file_of_data_is_named(reason: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (data / "good.jsonl").write_text(LINE, encoding="utf-8")
    (data / "inner/link.jsonl").symlink_to("../good.jsonl")
    (data / "back").symlink_to(".")
    STRANGE[reason](data / "train.jsonl")
    found, [(_, text)] = origins.find_files(data, len, 100, [], LIMITS)
    assert [Path(origin.name).name for origin in found] == ["good.jsonl", "link.jsonl"]
    assert reason in text


def test_links_into_dvcs_cache_are_followed(tmp_path: Path) -> None:
    for cache in (tmp_path / ".dvc/cache", tmp_path / "elsewhere"):
        cache.mkdir(parents=True)
        (cache / "ab12").write_text(LINE, encoding="utf-8")
        data = tmp_path / cache.name
        folder = tmp_path / f"data-{cache.name}"
        folder.mkdir()
        (folder / "train.jsonl").symlink_to(data if data.is_file() else cache / "ab12")
    assert list_files(tmp_path / "data-cache")[0] == [tmp_path / "data-cache/train.jsonl"]
    assert list_files(tmp_path / "data-elsewhere")[0] == []


def test_the_folder_of_data_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/train.jsonl").write_text(LINE, encoding="utf-8")
    (tmp_path / "data").symlink_to("real")
    assert list_files(tmp_path / "data")[0] == [tmp_path / "data/train.jsonl"]


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("prepare.no_folder", lambda path: None),
        ("prepare.not_a_folder", lambda path: path.write_bytes(b"")),
        ("prepare.not_a_folder", os.mkfifo),
        ("prepare.unreadable", lambda path: path.symlink_to(path.name)),
        ("prepare.project_in_data", lambda path: path.symlink_to("/")),
        ("prepare.project_in_data", lambda path: path.symlink_to(".")),
    ],
)
def test_a_folder_that_is_none(
    code: str, make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("data"))
    with refused(code):
        list_files(Path("data"))


def test_a_file_that_may_not_be_read_is_named(read: Read, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_bytes(b"{}")
    [origin], _ = origins.find_files(tmp_path / "data", len, 100, [], LIMITS)
    (tmp_path / "data/a.jsonl").unlink()  # as one that vanishes
    for act in (origin.lines, lambda: list(origin.read(FIXES))):
        with refused("prepare.unreadable", path=str(tmp_path / "data/a.jsonl")):
            act()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"\xff.jsonl", r"\xff.jsonl"),
        (b"a\nb.jsonl", r"a\nb.jsonl"),
        (b"\x1b[31m.jsonl", r"\x1b[31m.jsonl"),
        ("\u202egnp.jsonl".encode(), r"\u202egnp.jsonl"),
        (b"n" * 249 + b".jsonl", "n" * 249 + ".jsonl"),
    ],
)
def test_names_are_shown_as_text(name: bytes, shown: str, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(name)).write_text(LINE, encoding="utf-8")
    [origin], _ = origins.find_files(tmp_path, len, 100, [], LIMITS)
    assert origin.name == f"{tmp_path}/{shown}"
    assert [record.where for record in origin.read(FIXES)] == [f"{tmp_path}/{shown}:1"]


def test_the_demos_rows_beside_others_are_named(repo: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").symlink_to(repo / ".dvc")
    (tmp_path / "data").mkdir()
    paths = []
    for split in SPLITS:
        paths.append(str(tmp_path / f"data/{split}.jsonl"))
        Path(paths[-1]).write_bytes((data / f"{split}.jsonl").read_bytes())
    assert demo_note(tmp_path / "data", paths) is None
    Path(paths[0]).write_text(LINE, encoding="utf-8")
    note = demo_note(tmp_path / "data", paths)
    assert note is not None
    assert note[0] == paths[1]
    assert note[1].endswith(f"`rm {paths[1]} {paths[2]}`")
