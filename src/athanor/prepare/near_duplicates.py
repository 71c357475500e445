"""Rows of a held-out split that are trained on as well, exactly or nearly.

Texts are folded before they are compared: full-width letters and digits become plain ones, case is
dropped, white space is kept between Latin words only, and punctuation is dropped unless it
distinguishes things (C# and C, -5 and 5, 1.5 and 15). Near duplicates are found by MinHash
(Broder 1997) over character trigrams: held-out rows are indexed by bands of their signatures
(locality-sensitive hashing, Indyk and Motwani 1998), all others are streamed against the index, and
a candidate counts if the Jaccard similarity of the trigrams is high enough. Trigrams that many rows
have (a form, a phrase) do not count.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from athanor.prepare.tally import chunks

GRAM = 3
# 32 bands of 4, two of which must be shared: one in 600 pairs of similarity 0.7 is missed.
BANDS, ROWS, SHARED = 32, 4, 2
# The estimate from 128 minima has a standard deviation of 0.04: of one in 5,000 pairs at the limit
# it is lower by more than this.
MARGIN = 0.14
# Texts of the same band that are looked at, and those whose trigrams are compared, likeliest first.
OF_A_BAND, CANDIDATES = 200, 20
# Trigrams in more than this share of the texts do not count, unless they are in so few texts.
COMMON, FEW = 0.05, 3
# Texts that are sampled for common trigrams.
SAMPLE = 10_000
# Pairs whose minima are compared at a time: 64 MB.
PAIRS = 1 << 16
# Punctuation that distinguishes things: C# from C, -5 from 5, foo_bar from foobar.
DISTINCTIVE = "#%&*/@_\\-"
BMP = range(0x10000)
# Stands for the ! of "if (!x)", which ends no sentence.
NOT = "\ue000"


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Return patterns of a distinctive !, of space between words, and of dropped characters."""
    categories = ((character, unicodedata.category(character)) for character in map(chr, BMP))
    dropped = [
        re.escape(character)
        for character, category in categories
        if (category[0] in "PZ" or category in ("Cc", "Cf")) and character not in DISTINCTIVE
    ]
    both = "".join(dropped)
    white = "".join(character for character in dropped if character[-1].isspace())
    marks = "".join(character for character in dropped if not character[-1].isspace())
    return (
        re.compile(r"!(?=[a-z0-9(=])"),
        re.compile(rf"(?<=[a-z0-9])[{marks}]*[{white}][{both}]*(?=[a-z0-9])"),
        re.compile(rf"(?<![a-z0-9])[{both}]++|[{both}]++(?![a-z0-9])"),
    )


def fold(text: str) -> str:
    """Return a text as it is compared (see the module); one of punctuation alone stays."""
    if not text:
        return text
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    negation, between_words, dropped = _patterns()
    text = text.casefold()
    if "!" in text:
        text = negation.sub(NOT, text)
    folded = dropped.sub("", between_words.sub(" ", text))
    return (folded or " ".join(text.split())).replace(NOT, "!")


def digest(text: str) -> int:
    """Return 64 bits of a text; two of a million texts share theirs once in 37 million times."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def split_of(folded_digest: int, shares: dict[str, float]) -> str:
    """Return the split of a row by its digest: no other row moves it, and copies stay together.

    `shares` maps splits to shares of 1, in a fixed order.
    """
    place = folded_digest / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return next(reversed(shares))


class NearIndex:
    """An index of held-out texts, to find near duplicates of other texts.

    Memory: 900 bytes a text and the text itself.
    """

    def __init__(self, texts: list[str], similarity: float, common: np.ndarray) -> None:
        """Index folded texts.

        Args:
            texts: The texts, folded.
            similarity: The least Jaccard similarity of trigrams, 0 to 1.
            common: The trigrams that do not count, as from `common_grams`.
        """
        self.texts = texts
        self.similarity = similarity
        self._common = common
        parts = [self._minima_of(chunk) for chunk in chunks(texts)]
        self._minima = np.concatenate(parts)
        keys = np.concatenate([_band_keys(part) for part in parts])
        self._order = np.argsort(keys.T, axis=1, kind="stable").astype(np.int32)
        self._keys = np.take_along_axis(keys.T, self._order, axis=1)

    def nearest(self, texts: list[str]) -> Iterator[tuple[int, float] | None]:
        """Yield the number and similarity of the nearest indexed text of each text, or None."""
        minima = self._minima_of(texts)
        keys = _band_keys(minima)
        first = np.empty(keys.shape, np.int64)
        last = np.empty(keys.shape, np.int64)
        for band in range(BANDS):
            first[:, band] = np.searchsorted(self._keys[band], keys[:, band], "left")
            last[:, band] = np.searchsorted(self._keys[band], keys[:, band], "right")
        queries, numbers = self._sharing(first, np.minimum(last - first, OF_A_BAND))
        likeness = np.empty(len(numbers))
        for start in range(0, len(numbers), PAIRS):
            pairs = slice(start, start + PAIRS)
            equal = self._minima[numbers[pairs]] == minima[queries[pairs]]
            likeness[pairs] = equal.mean(axis=1)
        likely = np.flatnonzero(likeness >= self.similarity - MARGIN)
        bounds = np.searchsorted(queries[likely], np.arange(len(texts) + 1))
        for number, text in enumerate(texts):
            near = likely[bounds[number] : bounds[number + 1]]
            yield self._best(text, numbers[near], likeness[near]) if len(near) else None

    def _sharing(self, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of a query and an indexed text that share enough bands, in order.

        `first` and `counts` [queries, bands] are the places of the texts that share a band.
        """
        queries, band = np.nonzero(counts)
        count = counts[queries, band]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(first[queries, band], count) + within
        numbers = self._order[np.repeat(band, count), place]
        pairs, shared = np.unique(np.repeat(queries, count) << 32 | numbers, return_counts=True)
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
        """Return the MinHash signatures of texts, uint32 [texts, BANDS * ROWS]."""
        from datasketch import MinHash

        sets = (self._grams(text) for text in texts)
        hashed = (
            (grams * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).tolist() for grams in sets
        )
        signatures = MinHash.generator(hashed, num_perm=BANDS * ROWS, hashfunc=int)
        return np.stack([signature.hashvalues for signature in signatures])

    def _grams(self, text: str) -> np.ndarray:
        """Return the trigrams of a text that count; all of them, if none does."""
        grams = _grams(text)
        if not len(self._common):
            return grams
        place = np.minimum(np.searchsorted(self._common, grams), len(self._common) - 1)
        counting = grams[self._common[place] != grams]
        return counting if len(counting) else grams


def common_grams(texts: list[str]) -> np.ndarray:
    """Return the trigrams that many of these texts have, sorted."""
    if not texts:
        return np.empty(0, np.uint64)
    grams, counts = np.unique(np.concatenate([_grams(text) for text in texts]), return_counts=True)
    return grams[counts > max(COMMON * len(texts), FEW)]


def _grams(text: str) -> np.ndarray:
    """Return the distinct trigrams of a text as sorted numbers; a short text is one gram."""
    padded = text if len(text) >= GRAM else text.ljust(GRAM)
    codes = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    return np.unique(codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:])


def _jaccard(grams: np.ndarray, others: np.ndarray) -> float:
    shared = len(np.intersect1d(grams, others, assume_unique=True))
    return float(shared / (len(grams) + len(others) - shared))


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """Return a number for each band, uint64 [texts, BANDS]: equal where the band's minima are."""
    keys = np.zeros((len(minima), BANDS), np.uint64)
    for row in range(ROWS):
        keys = (keys ^ minima[:, row::ROWS]) * np.uint64(0xD6E8FEB86659FD93)
        keys ^= keys >> np.uint64(32)
    return keys
