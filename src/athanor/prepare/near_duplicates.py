"""Rows that are held out and trained on at once, to the letter or almost.

Two texts are compared after folding: compatibility forms (full-width letters and digits) as plain
ones, no case, white space only between words of Latin letters, no punctuation but what tells things
apart (C# and C, -5 and 5, 1.5 and 15). Near ones are found by MinHash (Broder 1997) over character
trigrams: the held-out rows are indexed by bands of their signatures (locality-sensitive hashing,
Indyk and Motwani 1998), the others are streamed against it, and a candidate counts if the Jaccard
similarity of the trigrams themselves is reached. Trigrams that many rows have are what rows of a
kind share, a form or a phrase, and make no two of them alike: they do not count.
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
# Trigrams in more than this share of the texts do not count; in so few texts, all do.
COMMON, FEW = 0.05, 3
# So many texts tell which trigrams are common.
SAMPLE = 10_000
# Pairs whose minima are compared at a time: 64 MB.
PAIRS = 1 << 16


# Punctuation that tells things apart: C# from C, -5 from 5, foo_bar from foobar.
TELLING = "#%&*/@_\\-"
# Stands for the ! of "if (!x)", which is no end of a sentence.
NOT = "\ue000"


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A telling !; white space between two words; what else is dropped."""
    dropped = [
        chr(code)
        for code in range(0x10000)
        if unicodedata.category(chr(code))[0] in "PZ"
        or unicodedata.category(chr(code)) in ("Cc", "Cf")
    ]
    dropped = [character for character in dropped if character not in TELLING]
    both = "".join(map(re.escape, dropped))
    white = "".join(re.escape(character) for character in dropped if character.isspace())
    marks = "".join(re.escape(character) for character in dropped if not character.isspace())
    return (
        re.compile(r"!(?=[a-z0-9(=])"),
        re.compile(rf"(?<=[a-z0-9])[{marks}]*[{white}][{both}]*(?=[a-z0-9])"),
        re.compile(rf"(?<![a-z0-9])[{both}]++|[{both}]++(?![a-z0-9])"),
    )


def fold(text: str) -> str:
    """A text as it is compared: see the module's docstring. One of punctuation alone stays."""
    if not text:
        return text
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    telling, between_words, dropped = _patterns()
    text = text.casefold()
    if "!" in text:
        text = telling.sub(NOT, text)
    folded = dropped.sub("", between_words.sub(" ", text))
    return (folded or " ".join(text.split())).replace(NOT, "!")


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

    def __init__(self, texts: list[str], similarity: float, common: np.ndarray) -> None:
        """`texts` are folded; `similarity` is the least Jaccard similarity of trigrams, 0 to 1.

        `common` are the trigrams that do not count.
        """
        self.texts = texts
        self.similarity = similarity
        self._common = common
        parts = [
            self._minima_of(texts[start : start + 1000]) for start in range(0, len(texts), 1000)
        ]
        self._minima = np.concatenate(parts)
        keys = np.concatenate([_band_keys(part) for part in parts])
        self._order = np.argsort(keys.T, axis=1, kind="stable").astype(np.int32)
        self._keys = np.take_along_axis(keys.T, self._order, axis=1)

    def nearest(self, texts: list[str]) -> Iterator[tuple[int, float] | None]:
        """For each text, folded: the number of the nearest held-out one and its similarity."""
        minima = self._minima_of(texts)
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
        wanted = self._grams(text)
        for number in numbers[np.argsort(-likeness, kind="stable")][:CANDIDATES]:
            similarity = _jaccard(wanted, self._grams(self.texts[number]))
            if similarity >= self.similarity and (best is None or similarity > best[1]):
                best = int(number), similarity
        return best

    def _minima_of(self, texts: list[str]) -> np.ndarray:
        return _minima([self._grams(text) for text in texts])

    def _grams(self, text: str) -> np.ndarray:
        """The trigrams of a text that count; all of them, if none does."""
        grams = _grams(text)
        if not len(self._common):
            return grams
        place = np.minimum(np.searchsorted(self._common, grams), len(self._common) - 1)
        counting = grams[self._common[place] != grams]
        return counting if len(counting) else grams


def common_grams(texts: list[str]) -> np.ndarray:
    """The trigrams that many of some texts have, sorted."""
    if not texts:
        return np.empty(0, np.uint64)
    found, counts = np.unique(np.concatenate([_grams(text) for text in texts]), return_counts=True)
    return found[counts > max(COMMON * len(texts), FEW)]


def _grams(text: str) -> np.ndarray:
    """The distinct trigrams of a text, each as one number; sorted. A short text is one gram."""
    padded = text if len(text) >= GRAM else text.ljust(GRAM)
    codes = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    return np.unique(codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:])


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return float(shared / (len(one) + len(other) - shared))


def _minima(grams: list[np.ndarray]) -> np.ndarray:
    """The MinHash signatures of sets of trigrams: (sets, BANDS * ROWS), uint32."""
    from datasketch import MinHash

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
