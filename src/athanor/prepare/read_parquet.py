"""Records of Parquet files, a batch of rows in memory at a time.

A Parquet file of a few kilobytes can hold a million copies of a long text, by their number in a
dictionary. Its columns of text are measured in that form before any row is built.
"""

from collections.abc import Iterator
from typing import IO, Any

from athanor.prepare.checks import Fault
from athanor.prepare.read_tables import first_line
from athanor.prepare.records import Record, without_filled_nulls
from athanor.prepare.streams import (
    RATIO,
    DataFile,
    Limits,
    row_too_large,
    unpacks_too_large,
)

ROWS = 1000
# More rows than this are copies where there are a hundred of them for each byte of the file.
MOST_ROWS = 1_000_000
# The most bytes of a batch.
BATCH = 32 << 20


def read_parquet(file: DataFile, name: str) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    import pyarrow

    line = 0
    try:
        with file.open_binary() as binary:
            for value, size in _rows(binary, file.limits):
                line += 1
                faults = [value] if isinstance(value, Fault) else []
                row = None if faults else without_filled_nulls(value)
                yield Record(name, line, row, faults, size=size)
    except Fault as fault:
        yield Record(name, line + 1, None, [fault])
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        text = f"not a readable Parquet file: {first_line(error)}"
        yield Record(name, line + 1, None, [Fault("unreadable_file", text)])


def _rows(binary: IO[bytes], limits: Limits) -> Iterator[tuple[Any, int]]:
    """Yield the values of rows, and their size; a Fault for a row that is too large."""
    from pyarrow import parquet

    size = binary.seek(0, 2)
    binary.seek(0)
    with parquet.ParquetFile(binary) as file:
        meta = file.metadata
        plain = max(
            (meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)), default=0
        )
        most = max(limits.file, RATIO * size)
        if plain > limits.file or meta.num_rows > max(MOST_ROWS, RATIO * size):
            raise unpacks_too_large(size, limits.file)
        unpacked, longest = _measure(binary, file, limits.file)
        if unpacked > most:
            raise unpacks_too_large(size, limits.file)
        rows = max(1, min(ROWS, BATCH // max(longest, 1)))
        for batch in file.iter_batches(batch_size=rows):
            if batch.nbytes <= limits.row:
                size = batch.nbytes // max(batch.num_rows, 1)
                yield from ((value, size) for value in batch.to_pylist())
                continue
            for at in range(batch.num_rows):
                row = batch.slice(at, 1)
                if (size := row.nbytes) > limits.row:
                    yield row_too_large(limits.row), 0
                else:
                    yield row.to_pylist()[0], size


def _measure(binary: IO[bytes], file: Any, limit: int) -> tuple[int, int]:
    """Return the bytes of all texts of a file, and of the longest one.

    Only columns whose dictionary could make more than `limit` bytes of a group are read for that.
    """
    import pyarrow.compute as pc
    from pyarrow import parquet

    unpacked, longest = 0, 1
    meta = file.metadata
    for group in range(meta.num_row_groups):
        for at in range(meta.num_columns):
            column = meta.row_group(group).column(at)
            unpacked += column.total_uncompressed_size
            if column.physical_type != "BYTE_ARRAY" or not column.has_dictionary_page:
                continue
            if column.num_values * column.total_uncompressed_size <= limit:
                continue
            path = column.path_in_schema
            binary.seek(0)
            texts = parquet.ParquetFile(binary, read_dictionary=[path])
            table = texts.read_row_group(group, columns=[path], use_threads=False)
            for chunk in table.column(0).chunks:
                leaf = _leaf(chunk)
                if not hasattr(leaf, "dictionary"):
                    continue
                lengths = pc.binary_length(leaf.dictionary.cast("binary"))
                longest = max(longest, pc.max(lengths).as_py() or 0)
                unpacked += pc.sum(pc.take(lengths, leaf.indices)).as_py() or 0
    return unpacked, longest


def _leaf(array: Any) -> Any:
    """Return the values inside lists and structs of one column."""
    import pyarrow

    while True:
        kind = array.type
        if pyarrow.types.is_struct(kind):
            array = array.field(0)
        elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            array = array.flatten()
        elif pyarrow.types.is_map(kind):
            array = array.items
        else:
            return array
