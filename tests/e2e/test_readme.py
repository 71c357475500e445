"""The READMEs stay true: what they point at exists, what they tell to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from athanor.config.compose import compose_config
from athanor.sweep.space import space


@pytest.fixture(scope="module", params=["README.md", "README.zh.md"])
def text(repo: Path, request: pytest.FixtureRequest) -> str:
    return (repo / request.param).read_text(encoding="utf-8")


def test_links_lead_somewhere(repo: Path, text: str) -> None:
    links = re.findall(r"\]\(([^)#]+?)\)", text)
    assert links
    assert [x for x in links if not x.startswith("https://") and not (repo / x).exists()] == []


def test_overrides_compose(repo: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    found = re.findall(r"-S ([\w.]+=[\w.,-]+)", text) + re.findall(r"athanor\.train (\S+)`", text)
    assert len(found) > 3
    for option in found:
        key, _, values = option.partition("=")
        for value in values.split(","):
            compose_config(Path("conf"), [f"{key}={value}"])


def test_sweeps_can_be_run(repo: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    commands = re.findall(r"^uv run python -m athanor\.sweep (.+)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = [one for one in shlex.split(command, comments=True) if one != "-m"]
        assert space(Path("conf"), arguments).total > 1
