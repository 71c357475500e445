"""How good answers are: figures of texts and of tokens, which read and write nothing.

What is compared is what a person would read: `compared` takes away a reasoning model's thought, and
gives canonically equivalent characters one form. The functions below take texts as they are given.
A figure of no answers is nan, as is one for which the references hold nothing to divide by.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence

from rapidfuzz.distance import Levenshtein
from sacrebleu import corpus_chrf

from athanor.chat.templates import OPENER, strip_thought

Ids = Sequence[int]

# Welleck et al. count repeats among four tokens in a row.
NGRAM = 4


def compared(text: str) -> str:
    """The part of a text that is compared: what follows a thought, in Unicode's form NFC.

    A thought ends with `</think>` or the like; where it begins is often in the prompt. One that
    never ends is followed by nothing. Of other texts every character counts, white space too.
    """
    said = strip_thought(text)
    if said == text and OPENER.match(text.lstrip()):
        said = ""
    return unicodedata.normalize("NFC", said)


def exact_match(
    answers: Sequence[str], references: Sequence[str], stopped: Sequence[bool]
) -> float:
    """The share of answers that are their reference to the character and ended by themselves.

    From 0 to 1. An answer that was cut off is none: nobody knows what would have followed.
    """
    triples = zip(answers, references, stopped, strict=True)
    return _mean(ended and answer == reference for answer, reference, ended in triples)


def character_error_rate(answers: Sequence[str], references: Sequence[str]) -> float:
    """sum(Levenshtein distance of answer and reference) / sum(length of reference), in characters.

    0 where all answers are their references, with no upper end: an answer may be longer than its
    reference. Characters are Unicode code points; an insertion, a deletion and a substitution cost
    1 each (Levenshtein 1966). nan where all references are empty.
    """
    pairs = zip(answers, references, strict=True)
    distance = sum(Levenshtein.distance(answer, reference) for answer, reference in pairs)
    length = sum(map(len, references))
    return distance / length if length else math.nan


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF of all answers together, from 0 to 100 (Popović 2015), as sacrebleu counts it.

    F-score of character n-grams of 1 to 6 with recall weighted twice as much as precision
    (beta = 2), averaged over those n that both sides have; case counts, white space does not. In
    sacrebleu's words `case:mixed|eff:yes|nc:6|nw:0|space:no`. nan where no reference has anything
    but white space.
    """
    pairs = list(zip(answers, references, strict=True))
    if not any(reference.strip() for reference in references):
        return math.nan
    return float(
        corpus_chrf([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score
    )


def stop_rate(stopped: Sequence[bool]) -> float:
    """The share of answers that ended by themselves before they were cut off, from 0 to 1."""
    return _mean(stopped)


def mean_length(answers: Sequence[Ids]) -> float:
    """The mean number of tokens in an answer, a thought's included."""
    return _mean(map(len, answers))


def repetition_rate(answers: Sequence[Ids], n: int = NGRAM) -> float:
    """The mean over answers of 1 - |different n-grams| / |n-grams| in tokens, from 0 to below 1.

    seq-rep-n of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training". An answer
    of fewer than n tokens repeats nothing: 0.
    """
    return _mean(_repeats(ids, n) for ids in answers)


def _repeats(ids: Ids, n: int) -> float:
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def label_places(
    answers: Sequence[str], stopped: Sequence[bool], labels: Sequence[str]
) -> list[int]:
    """The place in `labels` of the label that each answer is; len(labels) for none of them.

    An answer is a label if it ended by itself and is that label to the character, white space
    around it aside. One that never ended is none: what uses the model would have read more than
    the label.
    """
    places = {label: place for place, label in enumerate(labels)}
    none = len(labels)
    pairs = zip(answers, stopped, strict=True)
    return [places.get(answer.strip(), none) if ended else none for answer, ended in pairs]


def label_figures(given: Sequence[int], expected: Sequence[int]) -> dict[str, float]:
    """`accuracy` and `macro_f1` of labels by their places, both from 0 to 1.

    The F1 is the mean over the labels that are expected here: one that few rows have may be missing
    in a split, and would count as 0 however good the answers are.
    """
    if not expected:
        return {"accuracy": math.nan, "macro_f1": math.nan}
    from sklearn.metrics import accuracy_score, f1_score  # costs a second, which few data need

    f1 = f1_score(expected, given, labels=sorted(set(expected)), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(expected, given)), "macro_f1": float(f1)}


def confusion(given: Sequence[int], expected: Sequence[int], labels: int) -> list[list[int]]:
    """How often each of so many labels, a row, was answered with each, a column.

    labels × (labels + 1): the last column is what is no label.
    """
    counts = [[0] * (labels + 1) for _ in range(labels)]
    for place, right in zip(given, expected, strict=True):
        counts[right][place] += 1
    return counts


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
