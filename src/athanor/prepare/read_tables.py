"""Records of tables: CSV, Parquet, and data sets of Hugging Face."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor.errors import UserError
from athanor.prepare.checks import Fault
from athanor.prepare.records import BOM, NOT_UTF8, Record, is_utf8, strip_mark


def read_csv(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    """Yield the rows of a CSV file below its header; `fixes` names the faults that are mended."""
    name = str(path)
    csv.field_size_limit(sys.maxsize)
    header: list[str] | None = None
    since: list[str] = []  # the lines since the last record

    def text_lines() -> Iterator[str]:
        with path.open("rb") as file:
            for data in file:
                # Bytes that are not UTF-8 become lone surrogates, which are looked for in each row.
                since.append(data.removeprefix(BOM).decode(errors="surrogateescape"))
                yield since[-1]

    with path.open("rb") as file:
        _, faults, fixed = strip_mark(file.read(len(BOM)), fixes)
    if faults:
        yield Record(name, 1, None, faults)
    reader = csv.reader(text_lines(), strict=True)
    while True:
        line = reader.line_num + 1
        since.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            spanned = f"; {len(since):,} lines were read as one row" if len(since) > 1 else ""
            fault = Fault("wrong_columns", f"invalid CSV: {error}{spanned}")
            yield Record(name, line, "".join(since).rstrip("\r\n"), [fault])
            continue
        if cells is None:
            return
        if not cells:
            continue
        if wrong := _fault_of_cells(cells, header):
            yield Record(name, line, cells, [wrong], fixed)
            if header is None:
                return  # the columns are unknown
        elif header is None:
            header = [cell.strip() for cell in cells]
            continue
        else:
            yield Record(name, line, dict(zip(header, cells, strict=True)), [], fixed)
        fixed = []


def _fault_of_cells(cells: list[str], header: list[str] | None) -> Fault | None:
    if not is_utf8("".join(cells)):
        return Fault("invalid_utf8", NOT_UTF8)
    if header is None:
        names = [cell.strip() for cell in cells]
        separator = next((c for c in ";\t|" if c in names[0]), None) if len(names) == 1 else None
        if separator is not None:
            text = f"the columns seem to be separated by {separator!r}; save the file with commas"
            return Fault("unreadable_file", text)
        if len(set(names)) < len(names):
            return Fault("unreadable_file", "the header names a column twice")
    elif len(cells) != len(header):
        text = f"{len(cells)} cells, but the header has {len(header)}"
        return Fault("wrong_columns", text)
    return None


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file, a batch of them in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    line += 1
                    yield Record(str(path), line, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        text = f"not a readable Parquet file: {_first_line(error)}"
        yield Record(str(path), line + 1, None, [Fault("unreadable_file", text)])


def load_dataset(name: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits of a Hugging Face data set by name: of a local folder, or of a hub.

    Raises:
        UserError: where it can't be loaded, its library is not installed, or no revision fixes
            the state of a hub's data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("prepare.datasets_missing") from error
    if revision is None and not Path(name).exists():
        raise UserError("prepare.dataset_without_revision", dataset=name)
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(name, config, revision=revision))
    except Exception as error:  # its many readers raise exceptions of any kind
        raise UserError(
            "prepare.dataset_unreadable", dataset=name, reason=_first_line(error)
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
