"""Files of data as streams of UTF-8: regular files only, unpacked, decoded, and bounded.

A text file is scanned once before it is read: its size when unpacked, its lines, its encoding. So a
file that can't be read to its end is one fault of the file, and none of its rows is used.
"""

import gzip
import io
import os
import stat
import zlib
from codecs import getincrementaldecoder, getincrementalencoder
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from athanor.prepare import encodings
from athanor.prepare.checks import Fault

BLOCK = 1 << 20
ENCODING = "encoding"
# No text is packed so well; a file that is becomes a fault where it is large as well.
RATIO = 100

NOT_COMPLETE = "not a complete .gz file: {}; pack it, or download it, again"
# What unpacking raises for a file that is damaged.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Limits:
    """The most bytes of a row, and of a file that is unpacked or held in memory whole."""

    row: int
    file: int


@dataclass(frozen=True)
class Scan:
    """The facts of a text file: `lines` in UTF-8, the codec of its bytes, its open fault if any."""

    lines: int
    codec: str
    fault: Fault | None = None


@dataclass(frozen=True)
class DataFile:
    """A file of data. `path` is as it is named; `kind` is its suffix without .gz, in lower case."""

    path: Path
    limits: Limits

    @property
    def stem(self) -> str:
        """The file's name without its suffixes."""
        return self._unpacked.stem

    @property
    def kind(self) -> str:
        """The suffix of the unpacked file, in lower case, with its dot."""
        return self._unpacked.suffix.lower()

    @property
    def is_packed(self) -> bool:
        """True for .gz."""
        return self.path.suffix.lower() == ".gz"

    @property
    def _unpacked(self) -> Path:
        return self.path.with_suffix("") if self.is_packed else self.path

    @cached_property
    def scan(self) -> Scan:
        """The facts of a text file, from one pass over it."""
        try:
            return self._scan()
        except DAMAGED as error:
            return Scan(0, "utf-8", Fault("unreadable_file", NOT_COMPLETE.format(error)))

    @contextmanager
    def open(self, fixes: frozenset[str]) -> Iterator[IO[bytes]]:
        """Open a text file as UTF-8.

        Raises:
            Fault: for a file that can't be read, whose encoding is not to be mended, or that has
                changed since it was scanned.
            OSError: as open does.
        """
        scan = self.scan
        if scan.fault is not None:
            raise scan.fault
        codec, _, carriage = scan.codec.partition("+")
        if codec != "utf-8" and ENCODING not in fixes:
            raise self.encoding_fault()
        try:
            with self._open() as raw:
                yield raw if scan.codec == "utf-8" else _recoded(raw, codec, bool(carriage))
        except (*DAMAGED, UnicodeError) as error:
            raise Fault("unreadable_file", f"the file changed while it was read: {error}") from None

    @contextmanager
    def open_binary(self) -> Iterator[IO[bytes]]:
        """Open a file that is read at many places; a packed one is unpacked into memory.

        Raises:
            Fault: for a packed one that is damaged or too large.
            OSError: as open does.
        """
        with self._open() as file:
            if not self.is_packed:
                yield file
                return
            try:
                unpacked = io.BytesIO(read_whole(file, self.limits.file))
            except DAMAGED as error:
                raise Fault("unreadable_file", NOT_COMPLETE.format(error)) from None
            yield unpacked

    def encoding_fault(self) -> Fault:
        """Return the fault of a file that is not UTF-8."""
        name = encodings.NAMES.get(codec := self.scan.codec.partition("+")[0], codec)
        text = f"the file is in {name}; `iconv -f {name} -t UTF-8 OLD > NEW` writes it in UTF-8"
        return Fault(ENCODING, text)

    def mended(self) -> list[Fault]:
        """Return the fault of the file's encoding, which `open` mended, if it has one."""
        return [] if self.scan.codec.startswith("utf-8") else [self.encoding_fault()]

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with open_regular(self.path) as file:
            if self.is_packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield file

    def _blocks(self) -> Iterator[bytes]:
        with self._open() as file:
            yield from iter(partial(file.read, BLOCK), b"")

    def _scan(self) -> Scan:
        size = lines = returns = nulls = 0
        decoder, codec = getincrementaldecoder("utf-8")(), "utf-8"
        start = b""
        packed = self.path.stat().st_size
        for block in self._blocks():
            size += len(block)
            if self.is_packed and size > max(self.limits.file, RATIO * packed):
                return Scan(0, codec, unpacks_too_large(packed, self.limits.file))
            start = start or block
            lines += block.count(b"\n")
            returns += block.count(b"\r")
            nulls += block.count(b"\0")
            if codec:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    codec = ""
        mark = encodings.of_mark(start)
        if mark is not None or not codec or nulls:
            codec = encodings.detect(self._blocks, mark, nulls) or codec or "utf-8"
            if mark is not None and codec == "utf-8":
                name = encodings.NAMES[mark]
                text = f"the file begins with the mark of {name}, but is not {name} to its end"
                return Scan(0, codec, Fault("unreadable_file", text))
        if returns and not lines:
            return Scan(returns, f"{codec}+returns")
        return Scan(lines, codec)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file that is a regular one; others could block for ever, or never end.

    Raises:
        OSError: where it is not, or can't be opened.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(None, "not a regular file", str(path))
    return os.fdopen(number, "rb")


def read_lines(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """Yield the lines of a file; of a line above the limit, its first limit + 1 bytes."""
    while line := file.readline(limit + 1):
        yield line
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := file.readline(BLOCK)) and not rest.endswith(b"\n"):
                pass


def read_whole(file: IO[bytes], limit: int) -> bytes:
    """Return the bytes of a file that is held in memory whole.

    Raises:
        Fault: where it has more bytes than the limit.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise _too_large("the file", limit)
    return data


def row_too_large(limit: int) -> Fault:
    """Return the fault of a row of more bytes than data.max_row_bytes."""
    text = f"the row has more than {limit:,} bytes; cut it, or raise data.max_row_bytes"
    return Fault("too_large", text)


def unpacks_too_large(packed: int, limit: int) -> Fault:
    """Return the fault of a file that unpacks to more than data.max_file_bytes, 100-fold."""
    text = (
        f"{packed:,} bytes unpack to more than {limit:,}, and to more than {RATIO} times as many; "
        "to read the file nevertheless, raise data.max_file_bytes"
    )
    return Fault("unreadable_file", text)


def _too_large(subject: str, limit: int) -> Fault:
    text = f"{subject} has more than {limit:,} bytes; split it, or raise data.max_file_bytes"
    return Fault("unreadable_file", text)


class _Recoded(io.RawIOBase):
    """A stream of text in another encoding, or with returns as line ends, as UTF-8."""

    def __init__(self, file: IO[bytes], codec: str, ends_in_returns: bool) -> None:
        errors = "surrogateescape" if codec == "utf-8" else "strict"
        self._file = file
        self._decoder = getincrementaldecoder(codec)(errors)
        self._encoder = getincrementalencoder("utf-8")(errors)
        self._ends_in_returns = ends_in_returns
        self._mark = "" if codec == "utf-8" else "\ufeff"
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        is_last = False
        while not self._ready and not is_last:
            block = self._file.read(BLOCK)
            is_last = not block
            text = self._decoder.decode(block, is_last)
            if text:
                text, self._mark = text.removeprefix(self._mark), ""
            text = text.replace("\r", "\n") if self._ends_in_returns else text
            self._ready = memoryview(self._encoder.encode(text, is_last))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _recoded(file: IO[bytes], codec: str, ends_in_returns: bool) -> IO[bytes]:
    raw: Any = _Recoded(file, codec, ends_in_returns)
    return io.BufferedReader(raw, BLOCK)
