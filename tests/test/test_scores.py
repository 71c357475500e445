"""The figures of answers: small cases by hand, and what holds for all of them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.test import scores

TEXTS = st.text(alphabet="月亮ab é", max_size=8)
# The same examples in each run, however slow the machine is.
STEADY = settings(deadline=None, derandomize=True)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)
IDS = st.lists(st.integers(0, 3), max_size=20)


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("星期八", "星期八"),
        (" 星期八\n", " 星期八\n"),
        ("<think>\n\n</think>\n\n星期八", "星期八"),
        # The prompt of R1's template has opened the thought.
        ("Which day?\n</think>\n\n星期八", "星期八"),
        ("<think>\nWhich day", ""),
        ("what <think> means", "what <think> means"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("", ""),
    ],
)
def test_an_answer_is_compared_without_its_thought(text: str, compared: str) -> None:
    assert scores.normalize_answer(text) == compared


def test_exact_is_to_the_character_and_ended() -> None:
    answers, stopped = ["月亮", "月亮 ", "月亮", "月"], [True, True, False, True]
    assert scores.exact_match(answers, ["月亮"] * 4, stopped) == 1 / 4
    assert scores.stop_rate(stopped) == 3 / 4


def test_character_error_rate_by_hand() -> None:
    # A substitution of 3, two insertions before 2, and all of 4 left out.
    answers, references = ["星期七", "李德哥哥", ""], ["星期八", "德哥", "1234"]
    assert scores.character_error_rate(answers, references) == (1 + 2 + 4) / 9
    # More wrong than there is to be right.
    assert scores.character_error_rate(["abc"], ["d"]) == 3
    # Characters outside of the first 65,536 are one each.
    assert scores.character_error_rate(["🌕"], ["🌖"]) == 1


@STEADY
@given(PAIRS)
def test_character_error_rate_is_0_for_what_is_expected_alone(pairs: list[tuple[str, str]]) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    rate = scores.character_error_rate(answers, references)
    if any(references):
        assert 0 <= rate <= sum(map(max, map(len, answers), map(len, references)))
        assert (rate == 0) == (answers == references)
    else:
        assert math.isnan(rate)


def test_chrf_by_hand() -> None:
    # 星, 期 and 星期 of 星, 期, 八, 星期, 期八; of three characters the answer has nothing.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    f2 = 5 * precision * recall / (4 * precision + recall)
    assert scores.chrf(["星期"], ["星期八"]) == pytest.approx(100 * f2)
    assert scores.chrf(["a b"], ["ab"]) == 100
    assert scores.chrf(["AB"], ["ab"]) == 0
    # All answers together, not the mean of each: 3 of 3 single characters and 2 of 2 pairs …
    together = scores.chrf(["星期八", "ab"], ["星期八", "cd"])
    assert together == pytest.approx(100 * (3 / 5 + 2 / 3 + 1) / 3)


@STEADY
@given(PAIRS)
def test_chrf_is_100_for_what_is_expected(pairs: list[tuple[str, str]]) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    if not "".join(references).strip():
        assert math.isnan(scores.chrf(answers, references))
    else:
        assert scores.chrf(references, references) == pytest.approx(100)
        assert 0 <= scores.chrf(answers, references) <= 100 + 1e-9


def test_repetition_by_hand() -> None:
    # 1234, 2341, 3412, 4123, 1234: one of five is there already.
    assert scores.repetition_rate([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    # Seven times the same four tokens, six of them repeats; three tokens repeat nothing.
    assert scores.repetition_rate([[7] * 10, [7] * 3]) == pytest.approx((6 / 7 + 0) / 2)
    assert scores.repetition_rate([[1, 1, 1]], n=1) == pytest.approx(2 / 3)
    assert scores.mean_length([[7] * 10, [7] * 3, []]) == 13 / 3


@STEADY
@given(st.lists(IDS, min_size=1, max_size=4), st.integers(1, 5))
def test_repetition_is_0_where_every_token_is_another(answers: list[list[int]], n: int) -> None:
    assert 0 <= scores.repetition_rate(answers, n) < 1
    assert scores.repetition_rate([list(range(len(ids))) for ids in answers], n) == 0


def test_of_no_answers_there_are_no_figures() -> None:
    values = [
        scores.exact_match([], [], []),
        scores.character_error_rate([], []),
        scores.chrf([], []),
        scores.stop_rate([]),
        scores.mean_length([]),
        scores.repetition_rate([]),
        *scores.score_labels([], []).values(),
    ]
    assert all(map(math.isnan, values))


def test_of_empty_references_nothing_can_be_divided() -> None:
    assert math.isnan(scores.character_error_rate(["text"], [""]))
    assert math.isnan(scores.chrf(["text"], [" "]))
    # Among other references, an empty one counts the superfluous characters.
    assert scores.character_error_rate(["text", "ab"], ["", "ab"]) == 2


def test_answers_and_references_are_as_many() -> None:
    for figure in (scores.character_error_rate, scores.chrf):
        with pytest.raises(ValueError, match="shorter"):
            figure(["a", "b"], ["a"])


def test_labels_are_places() -> None:
    answers, stopped = [" yes\n", "no", "no", "perhaps"], [True, True, False, True]
    assert scores.find_labels(answers, stopped, ["no", "yes"]) == [1, 0, 2, 2]
    assert scores.confusion([1, 0, 2], [1, 1, 0], 2) == [[0, 0, 1], [1, 1, 0]]
