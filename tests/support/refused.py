"""Errors by their code and facts, whatever their sentences are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from athanor.config.rules import ConfigError
from athanor.errors import UserError


@contextmanager
def refused(code: str, **facts: Any) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError of this code, with at least these facts."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    assert {name: caught.value.facts.get(name) for name in facts} == facts


@contextmanager
def refused_keys(*problems: tuple[str, str]) -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """Expect a ConfigError with at least these problems, by code and key."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    assert {*problems} <= {(problem.code, problem.key) for problem in caught.value.problems}
