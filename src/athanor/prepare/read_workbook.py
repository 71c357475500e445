"""Records of a workbook: the rows of the first sheet of an .xlsx, read by calamine.

calamine holds a sheet as a dense table, with every shared string copied into its cells. A workbook
is a few kilobytes that may claim a table of any size, so its parts are looked at before.
"""

import re
import zipfile
from collections.abc import Iterator
from typing import IO

from athanor.prepare.checks import Fault
from athanor.prepare.read_tables import first_line, read_sheet
from athanor.prepare.records import Record
from athanor.prepare.streams import BLOCK, DataFile, unpacks_too_large

MOST_CELLS = 5_000_000
# A cell's or a row's place, as r="C7" or r="7".
PLACE = re.compile(rb"""\sr\s*=\s*["']([A-Za-z]{0,3})(\d{1,9})["']""")
SHARED = re.compile(rb"""<c\s[^>]*\bt\s*=\s*["']s["'][^>]*>\s*<v>\s*(\d+)""")
STRING = re.compile(rb"<si\b[^>]*>(.*?)</si>", re.S)
SHEET = re.compile(r"/?xl/worksheets/[^/]*\.xml", re.IGNORECASE)
STRINGS = re.compile(r"/?xl/sharedStrings\.xml", re.IGNORECASE)
# Bytes that may belong to a match which goes on in the next block.
OVERLAP = 4096


def read_workbook(file: DataFile, name: str) -> Iterator[Record]:
    """Yield the rows of the first sheet below its header."""
    from python_calamine import CalamineError, CalamineWorkbook

    try:
        with file.open_binary() as binary:
            _check_parts(binary, file.limits.file)
            binary.seek(0)
            book = CalamineWorkbook.from_filelike(binary)
            if not book.sheet_names:
                return
            sheet = book.get_sheet_by_index(0)
            rows = sheet.to_python(skip_empty_area=True)
            first = sheet.start[0] + 1 if sheet.start else 1
    except Fault as fault:
        yield Record(name, 1, None, [fault])
        return
    except zipfile.BadZipFile as error:
        text = f"not a readable .xlsx workbook (is it encrypted, or an .xls?): {error}"
        yield Record(name, 1, None, [Fault("unreadable_file", text)])
        return
    except (CalamineError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        text = f"not a readable .xlsx workbook: {first_line(error)}"
        yield Record(name, 1, None, [Fault("unreadable_file", text)])
        return
    yield from read_sheet(iter(rows), name, first, file.limits.row)


def _check_parts(file: IO[bytes], limit: int) -> None:
    """Look at the parts of a workbook before they are read.

    Raises:
        Fault: where they unpack to more than `limit` bytes, or make more cells than a sheet has.
        zipfile.BadZipFile: for a file that is none.
    """
    unpacked = shared = cells = 0
    lengths: list[int] = []
    size = file.seek(0, 2)
    file.seek(0)
    with zipfile.ZipFile(file) as book:
        parts = book.infolist()
        for part in sorted(parts, key=lambda part: STRINGS.fullmatch(part.filename) is None):
            blocks: list[bytes] = []
            rows, columns = [10**9, 0], [10**9, 0]
            is_sheet = SHEET.fullmatch(part.filename) is not None
            is_strings = STRINGS.fullmatch(part.filename) is not None
            tail, count = b"", 0
            with book.open(part) as stream:
                while block := stream.read(BLOCK):
                    unpacked += len(block)
                    if unpacked > limit:
                        raise unpacks_too_large(size, limit)
                    if is_strings:
                        blocks.append(block)
                    elif is_sheet:
                        tail += block
                        count += block.count(b"<c ") + block.count(b"<c>") + block.count(b"<c/")
                        for match in PLACE.finditer(tail):
                            _widen(rows, int(match[2]))
                            if match[1]:
                                _widen(columns, _column(match[1]))
                        cut = max(tail.rfind(b">") + 1, len(tail) - OVERLAP)
                        places = (int(match[1]) for match in SHARED.finditer(tail))
                        shared += sum(lengths[at] for at in places if at < len(lengths))
                        tail = tail[cut:]
            if is_strings:
                lengths = [len(match[1]) for match in STRING.finditer(b"".join(blocks))]
            if rows[1] and columns[1]:
                count = max(count, (rows[1] - rows[0] + 1) * (columns[1] - columns[0] + 1))
            cells += count
            if cells > MOST_CELLS or shared > limit:
                many = f"{MOST_CELLS:,} cells" if cells > MOST_CELLS else f"{limit:,} bytes of text"
                text = f"its sheets have more than {many}; save the first one as CSV"
                raise Fault("unreadable_file", text)


def _widen(span: list[int], place: int) -> None:
    span[0], span[1] = min(span[0], place), max(span[1], place)


def _column(letters: bytes) -> int:
    number = 0
    for letter in letters.upper():
        number = 26 * number + letter - 64
    return number
