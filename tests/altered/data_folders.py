"""Folders of data with one thing wrong in each, and `prepare` as the work on them."""

import csv
import gzip
import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
from pyarrow import parquet

REPO = Path(__file__).parents[2]
LOADED: list[Any] = []
WORDS = ["tide", "lamp 4", "月亮", "潮水", "caffè", "🌊", "north", "<b>", "|", ",", ";", "# * 'x'"]
MB = 2**20
NESTING = (
    *("[", "*", ">", "`", "> ", "- ", "* a ", "[a](", "![", "<!--", "<a ", "_a", "`a", "a**b"),
    *("&", "|a", "\\", "1. ", "[a]: b\n", "> - ", "~~~\n", "<", "](", "[[]]()", "---\n", "   "),
    *("\t>", "a\n=\n", "|a|\n|-|\n", "*a _b ", "[a][b]"),
)
NAMES = (
    *(b"\xff\xfe.jsonl", b"a\nb.jsonl", b"\x1b[31mred.jsonl", b"\x1b]0;title\x07.csv"),
    *(b"n" * 249 + b".jsonl", "\u202egnp.jsonl".encode(), b"$(touch x).jsonl", b"-rf.jsonl"),
    *(b"a\tb.csv", b" .jsonl", b"x.\xff", b"[b].md", b"\xc2\x9b31m.md"),
)


def load() -> None:
    """Import all that prepare needs, and read the configuration and the tokenizer."""
    from athanor.chat import load as chat_load
    from athanor.config.compose import compose_config
    from athanor.config.values import to_dataclass
    from athanor.prepare import prepare

    config = to_dataclass(compose_config(REPO / "conf", [f"model.path={REPO / 'models/tiny'}"]))
    tokenizer = chat_load.load_tokenizer(REPO / "models/tiny")
    prepare.load_configured_tokenizer = lambda *_: tokenizer
    LOADED.append(config)


def work(folder: Path) -> None:
    """Run the stage on `folder`/data, as its command does after it has read params.yaml."""
    from athanor.prepare.__main__ import _print_tables
    from athanor.prepare.prepare import prepare

    os.chdir(folder)
    _print_tables(prepare(Path("data"), Path("out"), LOADED[0]))
    for line in (
        Path("out/report.json").read_text(encoding="utf-8"),
        Path("out/report.html").read_text(encoding="utf-8"),
    ):
        assert "\x1b" not in line


# Rows, and files of every kind that prepare reads


def _text(chance: Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(3, 12)))


def _rows(chance: Random) -> list[dict[str, Any]]:
    kind = chance.choice(("pair", "chat", "text", "instruction", "label"))
    rows: list[dict[str, Any]] = []
    for number in range(chance.randint(3, 12)):
        question, answer = f"{number} {_text(chance)}?", _text(chance)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kinds: dict[str, dict[str, Any]] = {
            "pair": {"prompt": question, "completion": answer},
            "chat": {"messages": turns},
            "text": {"text": f"{question} {answer}"},
            "instruction": {"instruction": question, "input": "", "output": answer},
            "label": {"text": question, "label": chance.choice(("yes", "no"))},
        }
        rows.append(kinds[kind])
    return rows


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    keys = list(rows[0])
    values = [[row[key] for key in keys] for row in rows]
    return [keys, *([v if isinstance(v, str) else json.dumps(v) for v in row] for row in values)]


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(_cells(rows))
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


SHEET = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
RELATIONS = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _sheet(cells: list[list[str]]) -> str:
    rows = (
        "<row>"
        + "".join(f'<c t="inlineStr"><is><t>{_escaped(c)}</t></is></c>' for c in row)
        + "</row>"
        for row in cells
    )
    return f"{SHEET}<sheetData>{''.join(rows)}</sheetData></worksheet>"


def workbook(sheet: str, strings: str | None = None, prolog: str = "") -> bytes:
    """Return an .xlsx with one sheet."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"></Types>',
        )
        book.writestr(
            "_rels/.rels",
            f'{RELATIONS}<Relationship Id="r1" Type="{OFFICE}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
        )
        book.writestr(
            "xl/workbook.xml",
            '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
            f'xmlns:r="{OFFICE}"><sheets><sheet name="one" sheetId="1" r:id="r1"/></sheets>'
            "</workbook>",
        )
        book.writestr(
            "xl/_rels/workbook.xml.rels",
            f'{RELATIONS}<Relationship Id="r1" Type="{OFFICE}/worksheet" '
            f'Target="worksheets/sheet1.xml"/><Relationship Id="r2" Type="{OFFICE}/sharedStrings" '
            'Target="sharedStrings.xml"/></Relationships>',
        )
        if strings is not None:
            book.writestr("xl/sharedStrings.xml", strings)
        book.writestr("xl/worksheets/sheet1.xml", prolog + sheet)
    return file.getvalue()


def _article(chance: Random) -> bytes:
    parts = (f"## {_text(chance)}\n\n{_text(chance)}.\n\n- {_text(chance)}\n" for _ in range(6))
    return f"---\ntitle: {_text(chance)!r}\n---\n\n# One\n\n{''.join(parts)}".encode()


MAKERS: dict[str, Callable[[Random], bytes]] = {
    "jsonl": lambda chance: b"".join(
        json.dumps(row, ensure_ascii=chance.random() < 0.3).encode() + b"\n"
        for row in _rows(chance)
    ),
    "json": lambda chance: json.dumps(_rows(chance), indent=chance.choice((None, 1))).encode(),
    "csv": lambda chance: _table(_rows(chance), ","),
    "tsv": lambda chance: _table(_rows(chance), "\t"),
    "parquet": lambda chance: _parquet(_rows(chance)),
    "xlsx": lambda chance: workbook(_sheet(_cells(_rows(chance)))),
    "md": _article,
    "txt": _article,
}
MAKERS["ndjson"] = MAKERS["jsonl"]


def _fill(folder: Path, chance: Random) -> list[Path]:
    names = chance.choice((("rows",), ("train", "valid", "test"), ("train", "valid", "deep/rows")))
    kind = chance.choice(list(MAKERS))
    paths = []
    for name in names:
        path = folder / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = MAKERS[kind](chance)
        if kind not in ("xlsx", "parquet") and chance.random() < 0.2:
            path, data = path.with_name(f"{path.name}.gz"), gzip.compress(data)
        path.write_bytes(data)
        paths.append(path)
    return paths


# Alterations: each changes one file of a folder that was good, and returns what it did

Alteration = Callable[[Path, Random, Path], str]


def flip(path: Path, chance: Random, canary: Path) -> str:
    data = bytearray(path.read_bytes())
    count = chance.choice((1, 3, 50))
    for _ in range(count):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)
    return f"{count} bytes flipped"


def cut(path: Path, chance: Random, canary: Path) -> str:
    data = path.read_bytes()
    size = chance.choice((0, 1, 2, 4, len(data) // 2, len(data) - 1))
    path.write_bytes(data[:size])
    return f"cut to {size} bytes"


def splice(path: Path, chance: Random, canary: Path) -> str:
    data = path.read_bytes()
    at = chance.randrange(len(data))
    middle = chance.choice(
        (b"\0" * 5000, data, b"\xff\xfe", b"\r" * 9, b'"', b"\xef\xbb\xbf", b"\x1a")
    )
    path.write_bytes(data[:at] + middle + data[at:])
    return f"{middle[:12]!r}… put in"


def garbage(path: Path, chance: Random, canary: Path) -> str:
    magic = chance.choice(
        (b"", b"PAR1", b"PK\3\4", b"\x1f\x8b\x08\0", b"\xff\xfe", b"\x84\x31\x95\x33")
    )
    path.write_bytes(magic + chance.randbytes(chance.choice((1, 100, 100_000))) + magic)
    return f"random bytes between {magic!r}"


def rename(path: Path, chance: Random, canary: Path) -> str:
    suffix = chance.choice(
        (*MAKERS, "jsonl.gz", "csv.gz", "gz", "JSONL", "parquet.gz", "zip", "gz.gz")
    )
    path.rename(path.with_name(f"train.{suffix}"))
    return f"named .{suffix}"


def encode(path: Path, chance: Random, canary: Path) -> str:
    codec = chance.choice(("utf-16", "utf-16-le", "utf-32", "gb18030", "big5", "latin-1", "cp037"))
    path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode(codec, "replace"))
    return f"in {codec}"


def special_file(path: Path, chance: Random, canary: Path) -> str:
    path.unlink()
    kind = chance.choice(("folder", "fifo", "socket", "dangling", "loop", "deep", "no rights"))
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = Path.cwd()
                os.chdir(path.parent)  # a socket's name is short
                server.bind(path.name[:60])
                os.chdir(here)
        case "dangling":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
        case "deep":
            here = path.with_suffix("")
            for _ in range(600):
                here = here / "d"
            here.mkdir(parents=True) if len(str(here)) < 4000 else None
        case "no rights":
            path.write_bytes(b"{}")
            path.chmod(0)
    return kind


def link(path: Path, chance: Random, canary: Path) -> str:
    path.unlink()
    target = chance.choice(
        (
            "/",
            "/proc",
            "/dev/zero",
            "/dev/stdin",
            "/dev/tty",
            "/etc/passwd",
            "/proc/self/mem",
            ".",
            "..",
            "../..",
        )
    )
    path.symlink_to(target)
    return f"a link to {target}"


def whole_folder(path: Path, chance: Random, canary: Path) -> str:
    folder = canary.with_suffix("") / "data"
    kind = chance.choice(("file", "empty", "link to /", "loop", "missing", "fifo"))
    folder.rename(folder.with_name("elsewhere"))
    match kind:
        case "file":
            folder.write_text("x", encoding="utf-8")
        case "empty":
            folder.mkdir()
        case "link to /":
            folder.symlink_to("/")
        case "loop":
            folder.symlink_to("data")
        case "fifo":
            os.mkfifo(folder)
    return f"data/ is {kind}"


def deep_json(path: Path, chance: Random, canary: Path) -> str:
    depth = chance.choice((101, 990, 5000, 100_000, 3_000_000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}"), ('[{"text":', "}]")))
    body = opening * depth + (f"1{closing * depth}" if chance.random() < 0.7 else "")
    if chance.random() < 0.3:
        body = json.dumps({"messages": body})
    path.with_name(f"train.{chance.choice(('json', 'jsonl', 'csv', 'json.gz'))}").write_text(body)
    return f"JSON {depth} deep"


def huge(path: Path, chance: Random, canary: Path) -> str:
    unit = chance.choice(
        ("a", "7", " ", "\n", "月", "a b ", "\\u0000", "#", ",", "\t", "🌊", '"', "é", "ﷺ")
    )
    size = chance.choice((3 * MB, 20 * MB, 100 * MB))
    name = chance.choice(("jsonl", "json", "csv", "tsv", "txt", "md"))
    head, tail = {
        "jsonl": ('{"text": "', '"}\n'),
        "json": ('[{"text": "', '"}]'),
        "csv": ('prompt,completion\nx,"', '"\n'),
        "tsv": ("prompt\tcompletion\nx\t", "\n"),
    }.get(name, ("", ""))
    block = (unit * MB)[:MB].encode()
    with path.with_name(f"train.{name}").open("wb") as file:
        file.write(head.encode())
        for _ in range(max(1, size // len(block))):
            file.write(block)
        if chance.random() < 0.7:
            file.write(tail.encode())
    return f"{size // MB} MB of {unit!r} in .{name}"


def markdown(path: Path, chance: Random, canary: Path) -> str:
    unit = chance.choice(NESTING)
    count = chance.choice((10_000, 100_000, 1_000_000))
    path.with_name(f"train.{chance.choice(('md', 'txt', 'md.gz'))}").write_text(unit * count)
    return f"{count} of {unit!r} as Markdown"


def bomb(path: Path, chance: Random, canary: Path) -> str:
    kind = chance.choice(
        (
            "gz",
            "gz lines",
            "parquet",
            "parquet cell",
            "parquet rows",
            "xlsx",
            "xlsx wide",
            "strings",
        )
    )
    block = b"\0" * MB
    match kind:
        case "gz" | "gz lines":
            if kind == "gz lines":
                block = b'{"text": "a b c"}\n' * 60_000
            with gzip.open(path.with_name("train.jsonl.gz"), "wb", compresslevel=1) as file:
                for _ in range(1200):
                    file.write(block)
        case "parquet":
            table = pyarrow.table({"text": ["a" * 100_000] * 20_000})
            parquet.write_table(table, path.with_name("train.parquet"))
        case "parquet cell":
            table = pyarrow.table({"text": ["a" * (300 * MB)]})
            parquet.write_table(table, path.with_name("train.parquet"), compression="zstd")
        case "parquet rows":
            texts = pyarrow.array(["a b"]).dictionary_encode()
            indices = pyarrow.array(memoryview(bytes(4 * 50_000_000)).cast("i"))
            column = pyarrow.DictionaryArray.from_arrays(indices, texts.dictionary)
            parquet.write_table(pyarrow.table({"text": column}), path.with_name("train.parquet"))
        case "xlsx":
            data = workbook(SHEET + "<sheetData>" + "<row></row>" * 30 * MB)
            path.with_name("train.xlsx").write_bytes(data)
        case "xlsx wide":
            cells = '<c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>1</v></c>'
            sheet = f"{SHEET}<sheetData><row r='1'>{cells}</row></sheetData></worksheet>"
            path.with_name("train.xlsx").write_bytes(workbook(sheet))
        case "strings":
            cells = '<row><c t="s"><v>0</v></c></row>' * 20_000
            sheet = f"{SHEET}<sheetData>{cells}</sheetData></worksheet>"
            strings = SHEET.replace("worksheet", "sst") + f"<si><t>{'a' * MB}</t></si></sst>"
            path.with_name("train.xlsx").write_bytes(workbook(sheet, strings))
    return f"bomb: {kind}"


def named(path: Path, chance: Random, canary: Path) -> str:
    name = chance.choice(NAMES)
    path.rename(path.parent / os.fsdecode(name))
    return f"the name {name[:30]!r}"


def values(path: Path, chance: Random, canary: Path) -> str:
    """Rows whose values are of other kinds, or have characters that a terminal obeys."""

    def value(depth: int = 0) -> Any:
        texts = (
            "\x1b[2J",
            "\x9b31m",
            "\u202e",
            "a\0b",
            "\ud800",
            "<|im_end|>",
            "{{ x }}",
            "\x1b]8;;x\x07",
            "\r",
            "",
        )
        plain = (None, True, 0, -1, 1e308, 10**30, *texts)
        if depth > 2 or chance.random() < 0.6:
            return chance.choice(plain)
        if chance.random() < 0.5:
            return [value(depth + 1) for _ in range(chance.randint(0, 3))]
        keys = ("role", "content", "function", "name", "arguments", "tool_calls", *texts)
        return {chance.choice(keys): value(depth + 1) for _ in range(chance.randint(0, 4))}

    rows = _rows(chance)
    for row in rows:
        if chance.random() < 0.7:
            row[
                chance.choice((*row, "system", "tools", "source", "history", "label", "images"))
            ] = value()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.with_name("train.jsonl").write_text(text, encoding="utf-8")
    return "values of other kinds"


class _Touch:
    """An object whose unpickling touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def code(path: Path, chance: Random, canary: Path) -> str:
    """Code in a place where some reader could run it."""
    touch = f"touch {canary}"
    folder = path.parent
    kind = chance.choice(("pickle", "script", "yaml", "template", "entity", "extension", "name"))
    match kind:
        case "pickle":
            suffix = chance.choice(("pkl", "parquet", "jsonl", "json.gz", "xlsx"))
            folder.joinpath(f"train.{suffix}").write_bytes(pickle.dumps(_Touch(canary)))
        case "script":
            text = f"import os\nos.system({touch!r})\n"
            for name in ("data.py", "conftest.py", "sitecustomize.py", "__init__.py", "json.py"):
                folder.joinpath(name).write_text(text, encoding="utf-8")
        case "yaml":
            text = f"---\ntitle: !!python/object/apply:os.system ['{touch}']\n---\n\n# A\n\nb\n"
            folder.joinpath("train.md").write_text(text, encoding="utf-8")
        case "template":
            text = (
                "{{ cycler.__init__.__globals__.os.system('"
                + touch
                + "') }}{% include '/etc/passwd' %}"
            )
            row = {"prompt": text, "completion": text, "system": text}
            folder.joinpath("train.jsonl").write_text(json.dumps(row), encoding="utf-8")
        case "entity":
            prolog = (
                '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "' + "&a;" * 1000 + '"><!ENTITY c SYSTEM '
            )
            prolog += '"file:///etc/passwd">]>'
            sheet = _sheet([["prompt", "completion"], ["q", "Q"]]).replace("Q", "&b;&c;" * 1000)
            folder.joinpath("train.xlsx").write_bytes(workbook(sheet, prolog=prolog))
        case "extension":
            field = pyarrow.field("text", pyarrow.string()).with_metadata(
                {"ARROW:extension:name": "arrow.py_extension_type"}
                | {"ARROW:extension:metadata": pickle.dumps(_Touch(canary), protocol=0)}
            )
            table = pyarrow.table([pyarrow.array(["a", "b"])], schema=pyarrow.schema([field]))
            parquet.write_table(table, folder / "train.parquet")
        case "name":
            folder.joinpath(f"$(touch {canary.name}).jsonl").write_bytes(b"{}")
            folder.joinpath("`id`;x|y&z.csv").write_bytes(b"text\nx\n")
    return f"code: {kind}"


ALTERATIONS: tuple[Alteration, ...] = (
    flip,
    flip,
    cut,
    splice,
    garbage,
    rename,
    encode,
    special_file,
    link,
    whole_folder,
    deep_json,
    huge,
    markdown,
    bomb,
    named,
    values,
    values,
    code,
)


def alter(folder: Path, chance: Random, canary: Path) -> str:
    """Fill `folder`/data with good files, and make one thing wrong."""
    data = folder / "data"
    data.mkdir()
    path = chance.choice(_fill(data, chance))
    name = path.relative_to(folder)
    return f"{name}: {chance.choice(ALTERATIONS)(path, chance, canary)}"
