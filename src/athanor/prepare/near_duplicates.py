"""Copies of held-out rows that are trained on, exactly or nearly.

Texts are folded before they are compared: full-width letters and digits become plain ones, case is
dropped, white space is kept between Latin words only, and punctuation is dropped unless it
distinguishes things (C# and C, -5 and 5, 1.5 and 15).

A near copy has the same answer, after folding, the same tools, and a question that is nearly the
same: where another word changes the answer, that word is what a row teaches. Two rows are near if
the Jaccard similarity of their character trigrams is high enough. If more than a few rows have an
answer (a label, "yes"), the answer tells little: then the similarity has to be as high without the
trigrams that many rows have (a form, a phrase). Rows with a rare answer are looked up by it; all
others, plain texts among them, are found by MinHash (Broder 1997): held-out rows are indexed by
bands of their signatures (locality-sensitive hashing, Indyk and Motwani 1998), and the rest is
streamed against the index.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

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
# Trigrams in more than this share of the rows are common, unless they are in so few rows; an answer
# that more than the few have is frequent.
COMMON, FEW = 0.05, 3
# Texts that are sampled for common trigrams.
SAMPLE = 10_000
# Pairs whose minima are compared at a time: 64 MB.
PAIRS = 1 << 16
# In a folded row: after the context of its question if it has one, before its answer, and before
# the digest of its tools if it has any. Folding removes these characters from texts.
BESIDE, BETWEEN, TOOLS = "\x1e", "\x1f", "\x1d"
# Python's hash as an unsigned number.
BITS = 2**64 - 1
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


def answer_keys(rows: list[str]) -> np.ndarray:
    """Return a number for the answer of each row, uint64; 0 for rows without a question."""
    keys = (hash(answer) & BITS if question else 0 for _, question, answer in map(split_row, rows))
    return np.fromiter(keys, np.uint64, len(rows))


class NearIndex:
    """An index of held-out rows, to find near copies of them.

    Memory: the rows themselves, and 900 bytes for each that has no rare answer.
    """

    def __init__(
        self, rows: list[str], similarity: float, common: np.ndarray, frequent: np.ndarray
    ) -> None:
        """Index rows.

        Args:
            rows: The rows, folded: [context, BESIDE,] question, BETWEEN, answer[, TOOLS, digest].
            similarity: The least Jaccard similarity of trigrams, 0 to 1.
            common: The trigrams that many rows have, as from `common_grams`.
            frequent: The keys of answers that many rows have, as from `frequent_answers`.
        """
        self.rows = rows
        self.similarity = similarity
        self._common = common
        self._frequent = frequent
        answers = answer_keys(rows)
        rare = ~np.isin(answers, frequent)
        self._by_answer: dict[int, list[int]] = {}
        for number in np.flatnonzero(rare).tolist():
            self._by_answer.setdefault(int(answers[number]), []).append(number)
        self._indexed = np.flatnonzero(~rare)
        parts = [
            self._minima_of([rows[number] for number in chunk])
            for chunk in chunks(self._indexed.tolist())
        ]
        self._minima = np.concatenate([np.empty((0, BANDS * ROWS), np.uint64), *parts])
        keys = _band_keys(self._minima, answers[self._indexed])
        self._order = np.argsort(keys.T, axis=1, kind="stable").astype(np.int32)
        self._keys = np.take_along_axis(keys.T, self._order, axis=1)

    def nearest(self, rows: list[str]) -> Iterator[tuple[int, float] | None]:
        """Yield the number and similarity of the nearest indexed row of each row, or None."""
        answers = answer_keys(rows)
        rare = ~np.isin(answers, self._frequent)
        candidates = [self._by_answer.get(int(answer), []) for answer in answers]
        common = np.flatnonzero(~rare)
        if len(common) and len(self._indexed):
            likely = self._likely([rows[number] for number in common], answers[common])
            for number, numbers in zip(common.tolist(), likely, strict=True):
                candidates[number] = numbers
        for row, numbers, is_rare in zip(rows, candidates, rare.tolist(), strict=True):
            yield self._best(row, numbers, is_rare) if numbers else None

    def _likely(self, rows: list[str], answers: np.ndarray) -> list[list[int]]:
        """Return the numbers of indexed rows that are probably near, the likeliest first."""
        minima = self._minima_of(rows)
        keys = _band_keys(minima, answers)
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
        bounds = np.searchsorted(queries[likely], np.arange(len(rows) + 1))
        chosen = []
        for start, end in pairwise(bounds.tolist()):
            near = likely[start:end]
            order = np.argsort(-likeness[near], kind="stable")[:CANDIDATES]
            chosen.append(self._indexed[numbers[near[order]]].tolist())
        return chosen

    def _sharing(self, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of a query and an indexed row that share enough bands, in order.

        `first` and `counts` [queries, bands] are the places of the rows that share a band.
        """
        queries, band = np.nonzero(counts)
        count = counts[queries, band]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(first[queries, band], count) + within
        numbers = self._order[np.repeat(band, count), place]
        pairs, shared = np.unique(np.repeat(queries, count) << 32 | numbers, return_counts=True)
        pairs = pairs[shared >= SHARED]
        return pairs >> 32, pairs & 0xFFFFFFFF

    def _best(self, row: str, numbers: list[int], rare: bool) -> tuple[int, float] | None:
        """Return the nearest of some rows that have the same answer, None if none is near."""
        best: tuple[int, float] | None = None
        context, text = _split(row, rare)
        grams = _grams(text)
        counting = grams if rare else self._counting(grams)
        for number in numbers:
            known_context, known = _split(self.rows[number], rare)
            others = _grams(known)
            similarity = _jaccard(grams, others)
            if not rare:
                similarity = min(similarity, _jaccard(counting, self._counting(others)))
            if similarity < self.similarity or (best is not None and similarity <= best[1]):
                continue
            if context == known_context or self._are_near(context, known_context):
                best = number, similarity
        return best

    def _are_near(self, context: str, other: str) -> bool:
        """Return whether two contexts are near, with and without the trigrams of many rows."""
        grams, others = _grams(context), _grams(other)
        pairs = ((grams, others), (self._counting(grams), self._counting(others)))
        return all(_jaccard(*pair) >= self.similarity for pair in pairs)

    def _minima_of(self, rows: list[str]) -> np.ndarray:
        """Return the MinHash signatures of the questions of rows, uint32 [rows, BANDS * ROWS]."""
        from datasketch import MinHash

        sets = (self._counting(_grams(_split(row, False)[1])) for row in rows)
        hashed = (
            (grams * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).tolist() for grams in sets
        )
        signatures = MinHash.generator(hashed, num_perm=BANDS * ROWS, hashfunc=int)
        return np.stack([signature.hashvalues for signature in signatures])

    def _counting(self, grams: np.ndarray) -> np.ndarray:
        """Return the trigrams that only few rows have."""
        if not len(self._common):
            return grams
        place = np.minimum(np.searchsorted(self._common, grams), len(self._common) - 1)
        return grams[self._common[place] != grams]


def frequent_answers(keys: np.ndarray) -> np.ndarray:
    """Return the keys of the answers that more than a few rows have, and that of no answer."""
    values, counts = np.unique(keys, return_counts=True)
    return np.union1d(values[counts > FEW], np.zeros(1, np.uint64))


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
    return shared / max(len(grams) + len(others) - shared, 1)


def split_row(row: str) -> tuple[str, str, str]:
    """Return the context, the question and the answer, with its tools, of a folded row."""
    asked, _, answer = row.rpartition(BETWEEN)
    context, _, question = asked.rpartition(BESIDE)
    return context, question, answer


def _split(row: str, rare: bool) -> tuple[str, str]:
    """Return the context of a row, and the text that has to be near: with the answer if `rare`."""
    context, question, answer = split_row(row)
    if not question:
        return context, answer
    return context, question + BETWEEN + answer.partition(TOOLS)[0] if rare else question


def _band_keys(minima: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return a number for each band, uint64 [rows, BANDS]: equal where minima and answers are."""
    keys = np.repeat(answers[:, None], BANDS, axis=1)
    for row in range(ROWS):
        keys = (keys ^ minima[:, row::ROWS]) * np.uint64(0xD6E8FEB86659FD93)
        keys ^= keys >> np.uint64(32)
    return keys
