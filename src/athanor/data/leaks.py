"""Rows that are held out and trained on at once, to the letter or almost.

Two texts are compared after folding: compatibility forms (full-width letters and digits) as plain
ones, no case, no white space, no punctuation but what stands between two digits. Near ones are
found by MinHash (Broder 1997) over character trigrams: the held-out rows are indexed by bands of
their signatures (locality-sensitive hashing, Indyk and Motwani 1998), the others are streamed
against it, and a candidate counts if the Jaccard similarity of the trigrams themselves is reached.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

GRAM = 3
# 32 bands of 4, of which two have to be shared: of pairs of similarity 0.7 one in 600 is missed.
BANDS, ROWS, SHARED = 32, 4, 2
# What 128 minima say of a similarity is off by 0.04 (one standard deviation): this far below what
# is asked for, one in 5,000 of those that have it lies.
MARGIN = 0.14
# The texts that share one band with a text; and those whose trigrams are compared, likest first.
OF_A_BAND, CANDIDATES = 200, 20
# Pairs whose minima are compared at a time: 64 MB.
PAIRS = 1 << 16


@lru_cache(maxsize=1)
def _dropped() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """What folding drops: a run of it, such a run between two digits, any run but such a one."""
    kinds = "".join(
        re.escape(chr(code))
        for code in range(0x10000)
        if unicodedata.category(chr(code))[0] in "PZ"
        or unicodedata.category(chr(code)) in ("Cc", "Cf")
    )
    return (
        re.compile(rf"[{kinds}]+"),
        re.compile(rf"\d[{kinds}]+\d"),
        re.compile(rf"(?<![\d{kinds}])[{kinds}]++|[{kinds}]++(?!\d)"),
    )


def fold(text: str) -> str:
    """A text as it is compared: see the module's docstring. One of punctuation alone stays."""
    if not text:
        return text
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    dropped, between_digits, others = _dropped()
    text = text.casefold()
    if between_digits.search(text) is None:  # the same, three times as fast
        return dropped.sub("", text) or " ".join(text.split())
    return " ".join(others.sub("", text).split())


def digest(text: str) -> int:
    """64 bits of a text: among a million texts two share theirs once in 37 million times."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def split_of(folded_digest: int, shares: dict[str, float]) -> str:
    """The split of a row, by its digest: no other row moves it, and copies stay together.

    `shares` maps splits to shares of 1, in a fixed order.
    """
    place = folded_digest / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return next(reversed(shares))


class NearIndex:
    """Held-out texts, indexed to find those that are nearly another text.

    Memory: 900 bytes a text and the text itself.
    """

    def __init__(self, texts: list[str], similarity: float) -> None:
        """`texts` are folded; `similarity` is the least Jaccard similarity of trigrams, 0 to 1."""
        self.texts = texts
        self.similarity = similarity
        parts = [_minima(texts[start : start + 1000]) for start in range(0, len(texts), 1000)]
        self._minima = np.concatenate(parts)
        keys = np.concatenate([_band_keys(part) for part in parts])
        self._order = np.argsort(keys.T, axis=1, kind="stable").astype(np.int32)
        self._keys = np.take_along_axis(keys.T, self._order, axis=1)

    def nearest(self, texts: list[str]) -> Iterator[tuple[int, float] | None]:
        """For each text, folded: the number of the nearest held-out one and its similarity."""
        minima = _minima(texts)
        keys = _band_keys(minima)
        first = np.empty(keys.shape, np.int64)
        last = np.empty(keys.shape, np.int64)
        for band in range(BANDS):
            first[:, band] = np.searchsorted(self._keys[band], keys[:, band], "left")
            last[:, band] = np.searchsorted(self._keys[band], keys[:, band], "right")
        asking, numbers = self._sharing(first, np.minimum(last - first, OF_A_BAND))
        likeness = np.empty(len(numbers))
        for start in range(0, len(numbers), PAIRS):
            pairs = slice(start, start + PAIRS)
            equal = self._minima[numbers[pairs]] == minima[asking[pairs]]
            likeness[pairs] = equal.mean(axis=1)
        likely = np.flatnonzero(likeness >= self.similarity - MARGIN)
        bounds = np.searchsorted(asking[likely], np.arange(len(texts) + 1))
        for number, text in enumerate(texts):
            found = likely[bounds[number] : bounds[number + 1]]
            yield self._best(text, numbers[found], likeness[found]) if len(found) else None

    def _sharing(self, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each pair of a text that asks and one that shares bands enough with it, in order.

        `first` and `counts` say for each (text, band) where those that share it lie.
        """
        asking, band = np.nonzero(counts)
        count = counts[asking, band]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(first[asking, band], count) + within
        numbers = self._order[np.repeat(band, count), place]
        pairs, shared = np.unique(np.repeat(asking, count) << 32 | numbers, return_counts=True)
        pairs = pairs[shared >= SHARED]
        return pairs >> 32, pairs & 0xFFFFFFFF

    def _best(
        self, text: str, numbers: np.ndarray, likeness: np.ndarray
    ) -> tuple[int, float] | None:
        best: tuple[int, float] | None = None
        for number in numbers[np.argsort(-likeness, kind="stable")][:CANDIDATES]:
            similarity = _jaccard(_grams(text), _grams(self.texts[number]))
            if similarity >= self.similarity and (best is None or similarity > best[1]):
                best = int(number), similarity
        return best


def _grams(text: str) -> np.ndarray:
    """The distinct trigrams of a text, each as one number; sorted. A short text is one gram."""
    padded = text if len(text) >= GRAM else text.ljust(GRAM)
    codes = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    return np.unique(codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:])


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return float(shared / (len(one) + len(other) - shared))


def _minima(texts: list[str]) -> np.ndarray:
    """The MinHash signatures of texts: (texts, BANDS * ROWS), uint32."""
    from datasketch import MinHash

    grams = (_grams(text) for text in texts)
    hashed = ((gram * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).tolist() for gram in grams)
    signatures = MinHash.generator(hashed, num_perm=BANDS * ROWS, hashfunc=int)
    return np.stack([signature.hashvalues for signature in signatures])


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """A number a band for each signature, (texts, BANDS): equal where the band's minima are."""
    keys = np.zeros((len(minima), BANDS), np.uint64)
    for row in range(ROWS):
        keys = (keys ^ minima[:, row::ROWS]) * np.uint64(0xD6E8FEB86659FD93)
        keys ^= keys >> np.uint64(32)
    return keys
