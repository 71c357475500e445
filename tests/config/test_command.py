"""Command lines of stages: what they print instead of running, and what they refuse."""

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from athanor.config import schema
from athanor.config.command import read_overrides
from athanor.config.compose import compose_config
from support.refused import refused, refused_keys

ALL = ("seed", *schema.SECTIONS)


@pytest.fixture(autouse=True)
def workspace(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository as the current folder."""
    monkeypatch.chdir(repo)


def give(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["athanor", *arguments])


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    give(monkeypatch, *arguments)
    with pytest.raises(SystemExit) as caught:
        read_overrides("About it.", ALL, composes=True)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_every_key_with_its_comment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    text = printed(monkeypatch, capsys, flag, "train=dora", "train.rank=4,8")
    assert text.startswith("About it.")
    assert [key for key in schema.all_keys() if f"  {key}" not in text] == []
    assert "  train.method=dora\n" in text
    words = " ".join(text.split())
    assert "train.num_layers=-1 the last N layers; -1 for all" in words
    assert "train.keep=last the adapters for test and fuse: best" in words  # an experiment's value
    assert "train dora, full, lora" in words


@pytest.mark.parametrize("kind", ["job", "all"])
def test_cfg_prints_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text = printed(monkeypatch, capsys, "--cfg", kind, "fuse.system=短答")
    tree = yaml.safe_load(text)
    assert ("hydra" in tree) == (kind == "all")
    tree.pop("hydra", None)
    composed = compose_config(Path("conf"), ["fuse.system=短答"])
    assert tree == yaml.safe_load(OmegaConf.to_yaml(composed))


def test_version_and_overrides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(monkeypatch, capsys, "--version").startswith("athanor 0.")
    overrides = ["train.num_layers=-1", "~experiment", "fuse.system='- a'"]
    give(monkeypatch, *overrides)
    assert read_overrides(None, ALL) == overrides


@pytest.mark.parametrize("flag", ["--frob", "-m", "--multirun", "-x", "--hel", "--config-name=x"])
def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    give(monkeypatch, "seed=1", flag)
    with refused_keys(("config.unknown_flag", flag)):
        read_overrides(None, ALL)


@pytest.mark.parametrize("flags", [["--cfg"], ["--cfg", "x"], ["--info=x"], ["--help=x"]])
def test_options_with_a_wrong_value_are_refused(
    monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    give(monkeypatch, *flags)
    with refused("config.invalid_flag"):
        read_overrides(None, ALL)


def test_help_without_a_configuration_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot be listed: there is no conf/config.yaml" in printed(monkeypatch, capsys, "-h")
