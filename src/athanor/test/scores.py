"""The scores of answers, of texts and of tokens: pure functions.

Answers are compared as a person reads them: `normalize_answer` removes a reasoning model's thought
and gives canonically equivalent characters one form. The other functions take texts as they are. A
score of no answers is nan, and so is one whose references leave nothing to divide by.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence

from rapidfuzz.distance import Levenshtein
from sacrebleu import corpus_chrf

from athanor.chat.template_probes import OPENER
from athanor.chat.templates import strip_thought

Ids = Sequence[int]

# Welleck et al. count repeats among four tokens in a row.
NGRAM = 4


def normalize_answer(text: str) -> str:
    """Return the part of a text after a thought, in Unicode's form NFC.

    A thought ends with `</think>` or the like; its beginning is often in the prompt. After one that
    never ends nothing follows. In other texts every character counts, white space included.
    """
    answer = strip_thought(text)
    if answer == text and OPENER.match(text.lstrip()):
        answer = ""
    return unicodedata.normalize("NFC", answer)


def exact_match(
    answers: Sequence[str], references: Sequence[str], stopped: Sequence[bool]
) -> float:
    """Return the share of answers, 0 to 1, that equal their reference and ended by themselves.

    An answer that was cut off does not count: its continuation is unknown.
    """
    triples = zip(answers, references, stopped, strict=True)
    return _mean(ended and answer == reference for answer, reference, ended in triples)


def character_error_rate(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return sum(Levenshtein distance) / sum(length of references), in characters.

    0 where all answers are their references, without an upper limit: an answer may be longer than
    its reference. Characters are Unicode code points; an insertion, a deletion and a substitution
    cost 1 each (Levenshtein 1966). nan where all references are empty.
    """
    pairs = zip(answers, references, strict=True)
    distance = sum(Levenshtein.distance(answer, reference) for answer, reference in pairs)
    length = sum(map(len, references))
    return distance / length if length else math.nan


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF of all answers together, 0 to 100 (Popović 2015), as sacrebleu computes it.

    F-score of character n-grams of 1 to 6 with recall weighted twice as much as precision
    (beta = 2), averaged over those n that both sides have; case counts, white space does not:
    sacrebleu's `case:mixed|eff:yes|nc:6|nw:0|space:no`. nan where no reference has anything
    but white space.
    """
    pairs = list(zip(answers, references, strict=True))
    if not any(reference.strip() for reference in references):
        return math.nan
    return float(
        corpus_chrf([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score
    )


def stop_rate(stopped: Sequence[bool]) -> float:
    """Return the share of answers, 0 to 1, that ended by themselves before they were cut off."""
    return _mean(stopped)


def mean_length(answers: Sequence[Ids]) -> float:
    """Return the mean number of tokens in an answer, a thought's included."""
    return _mean(map(len, answers))


def repetition_rate(answers: Sequence[Ids], n: int = NGRAM) -> float:
    """Return the mean over answers of 1 - |distinct n-grams| / |n-grams| in tokens, 0 to below 1.

    seq-rep-n of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training". An answer
    of fewer than n tokens repeats nothing: 0.
    """
    return _mean(_repeats(ids, n) for ids in answers)


def _repeats(ids: Ids, n: int) -> float:
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def find_labels(
    answers: Sequence[str], stopped: Sequence[bool], labels: Sequence[str]
) -> list[int]:
    """Return the place in `labels` of each answer; len(labels) for an answer that is no label.

    An answer is a label if it ended by itself and equals the label, white space around it aside.
    One that never ended is none: a program that uses the model would read more than the label.
    """
    places = {label: place for place, label in enumerate(labels)}
    none = len(labels)
    pairs = zip(answers, stopped, strict=True)
    return [places.get(answer.strip(), none) if ended else none for answer, ended in pairs]


def score_labels(predicted: Sequence[int], expected: Sequence[int]) -> dict[str, float]:
    """Return `accuracy` and `macro_f1`, 0 to 1, of labels by their places.

    The F1 is the mean over the labels that are expected here: a rare one may be missing in a split,
    and would count as 0 however good the answers are.
    """
    if not expected:
        return {"accuracy": math.nan, "macro_f1": math.nan}
    from sklearn.metrics import accuracy_score, f1_score  # takes a second, for few data sets

    f1 = f1_score(
        expected, predicted, labels=sorted(set(expected)), average="macro", zero_division=0
    )
    return {"accuracy": float(accuracy_score(expected, predicted)), "macro_f1": float(f1)}


def confusion(predicted: Sequence[int], expected: Sequence[int], labels: int) -> list[list[int]]:
    """Return the confusion matrix, [labels, labels + 1]: a row for each expected label.

    The last column counts answers that are no label.
    """
    counts = [[0] * (labels + 1) for _ in range(labels)]
    for place, right in zip(predicted, expected, strict=True):
        counts[right][place] += 1
    return counts


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
