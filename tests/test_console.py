"""Printed texts are literal, whatever brackets they have."""

import pytest

from athanor import console


@pytest.mark.parametrize("text", [r"\[/INST] [/INST]", "[bold]x[/bold]", r"\[a+b\]", "[/x]"])
def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], text: str) -> None:
    console.print_table("title", ["head"], [[text]])
    console.print_facts("stage", {"fact": text})
    assert capsys.readouterr().out.count(text) == 2
