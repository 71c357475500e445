"""A cache of tokenizers, shared by the tests of `prepare`."""

from functools import lru_cache

import pytest

from athanor.chat.load import load_configured_tokenizer
from athanor.prepare import prepare

load_once = lru_cache(maxsize=4)(load_configured_tokenizer)


@pytest.fixture(autouse=True)
def tokenizers_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the tokenizer of each folder once; `prepare` changes nothing in it."""
    monkeypatch.setattr(prepare, "load_configured_tokenizer", load_once)
