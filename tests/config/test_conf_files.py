"""Files of conf/ and params.yaml that editors, cut copies and slips of the hand leave."""

import os
from pathlib import Path

import pytest

from athanor.config.compose import compose_config, load_config
from athanor.config.params_file import write_params
from athanor.config.rules import ConfigError
from athanor.errors import Problem
from athanor.paths import Workspace
from support.refused import refused, refused_keys

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


# Contents of a file: the code of its problem, and the line that is named, None for no line.
BROKEN: dict[str, tuple[bytes, str, int | None]] = {
    "byte order mark": (b"\xef\xbb\xbfseed: 1\n", "byte_order_mark", 1),
    "GB18030": ("seed: 1\n# 种子\n".encode("gb18030"), "not_utf8", 2),
    "UTF-16": ("seed: 1 # 种子\n".encode("utf-16"), "not_utf8", 1),
    "Windows": ("# naïve\n".encode("cp1252"), "not_utf8", 1),
    "binary": (bytes(range(256)), "not_utf8", 2),
    "NUL": (b"seed: 1\nx: \x00\n", "invalid_yaml", 2),
    "cut in a list": (b"seed: 1\nx: [1, 2\n", "invalid_yaml", 3),
    "cut in a text": (b'seed: 1\nx: "ab\n', "invalid_yaml", 3),
    "cut in a key": (b"seed: 1\ntra", "invalid_yaml", 2),
    "tab": (b"seed: 1\nx:\n\ty: 1\n", "invalid_yaml", 3),
    "key twice": (b"seed: 1\nseed: 2\n", "invalid_yaml", 2),
    "object": (b"seed: !!python/object/apply:os.getcwd []\n", "invalid_yaml", 1),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "invalid_yaml", 2),
    "list as a key": (b"? [1]\n: 2\n", "invalid_yaml", 1),
    "unknown alias": (b"seed: *a\n", "invalid_yaml", 1),
    "itself": (b"seed: &a [*a]\n", "invalid_yaml", 1),
    "aliases that multiply": (LAUGHS.encode(), "expands", None),
    "depth": (b"x: " + b"[" * 60 + b"]" * 60, "nested_too_deep", 1),
    "much depth": (b"x: " + b"[" * 900, "nested_too_deep", None),
    "size": (b"#" * 1_000_001, "file_too_large", None),
    "list": (b"- seed\n", "no_mapping", 1),
    "text": (b"seed\n", "no_mapping", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(conf: Path, name: str) -> None:
    content, code, line = BROKEN[name]
    path = conf / "train" / "lora.yaml"
    path.write_bytes(content)
    problem = refuse(conf, code)
    assert str(path) in problem.key
    if line is not None:
        assert problem.key == f"{path}:{line}"
    params = Path("params.yaml")
    params.write_bytes(content)
    for read in (lambda: load_config([]), lambda: load_config(["seed=2"])):
        with refused("config.invalid_params", params=params) as caught:
            read()
        assert f"params.yaml{'' if line is None else f':{line}'}" in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling link", "unreadable"])
def test_what_is_no_file_is_never_opened(conf: Path, kind: str) -> None:
    for path in (conf / "train" / "lora.yaml", Path("params.yaml")):
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "dangling link":
            path.symlink_to("nothing")
        else:
            path.symlink_to(path.name)  # a link to itself; a mode says nothing to root
    assert refuse(conf, "not_regular").key == str(conf / "train" / "lora.yaml")
    for read in (lambda: load_config([]), lambda: load_config(["seed=2"])):
        with refused("config.invalid_params", params=Path("params.yaml")):
            read()


# Files by their path in conf/, the overrides, and the problem.
WRONG_DEFAULTS = {
    "missing option": (
        {"experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: tinny\n"},
        ["experiment=mine"],
        ("unknown_option", "model: tinny", "conf/experiment/mine.yaml:2"),
    ),
    "missing file beside it": (
        {"train/mine.yaml": "defaults: [lara]\n"},
        ["train=mine"],
        ("unknown_option", "train: lara", "conf/train/mine.yaml:1"),
    ),
    "circle": (
        {"train/a.yaml": "defaults: [b]\n", "train/b.yaml": "\ndefaults: [a]\n"},
        ["train=a"],
        ("circular_defaults", "conf/train/b.yaml:2", None),
    ),
    "itself": (
        {"train/a.yaml": "defaults: [a]\n"},
        ["train=a"],
        ("circular_defaults", "conf/train/a.yaml:1", None),
    ),
    "no list": (
        {"train/a.yaml": "rank: 4\ndefaults: lora\n"},
        ["train=a"],
        ("invalid_defaults", "conf/train/a.yaml:2", None),
    ),
    "no item": (
        {"train/a.yaml": "defaults: [lora, 5]\n"},
        ["train=a"],
        ("invalid_defaults", "conf/train/a.yaml:1", None),
    ),
    "no package": (
        {"experiment/mine.yaml": "train:\n  rank: 4\n"},
        ["experiment=mine"],
        ("no_package", "conf/experiment/mine.yaml:1", None),
    ),
    "package below a comment": (
        {"experiment/mine.yaml": "# mine\n# @package _global_\ntrain:\n  rank: 4\n"},
        ["experiment=mine"],
        ("no_package", "conf/experiment/mine.yaml:1", None),
    ),
    "package without a name": (
        {"experiment/mine.yaml": "# @package\ntrain:\n  rank: 4\n"},
        ["experiment=mine"],
        ("invalid_yaml", "conf/experiment/mine.yaml:1", None),
    ),
    "own group without a package": (
        {"mine/x.yaml": "train:\n  rank: 4\n"},
        ["mine=x"],
        ("no_package", "conf/mine/x.yaml:1", None),
    ),
    "section inside a section": (
        {"train/a.yaml": "defaults: [lora]\ntrain:\n  rank: 4\n"},
        ["train=a"],
        ("unknown_key", "train.train", "conf/train/a.yaml:2"),
    ),
    "number of years": (
        {"train/a.yaml": "defaults: [lora]\niters: 2024-01-01\n"},
        ["train=a"],
        ("wrong_type", "train.iters", "conf/train/a.yaml:2"),
    ),
    "bytes": (
        {"train/a.yaml": "defaults: [lora]\nmethod: !!binary aGk=\n"},
        ["train=a"],
        ("no_plain_value", "train.method", "conf/train/a.yaml:2"),
    ),
    "half a character": (
        {"fuse/a.yaml": 'defaults: [default]\nsystem: "\\ud83d"\n'},
        ["fuse=a"],
        ("unreadable_text", "fuse.system", "conf/fuse/a.yaml:2"),
    ),
    "a key that is a number": (
        {"train/a.yaml": "defaults: [lora]\n1: 2\n"},
        ["train=a"],
        ("unknown_key", "train.1", "conf/train/a.yaml:2"),
    ),
}


@pytest.mark.parametrize("name", WRONG_DEFAULTS)
def test_a_file_of_ones_own_that_is_wrong_is_named(conf: Path, name: str) -> None:
    files, overrides, (code, key, place) = WRONG_DEFAULTS[name]
    write(conf, files)
    with pytest.raises(ConfigError) as caught:
        compose_config(conf, overrides)
    [problem] = caught.value.problems
    assert (problem.code, problem.key, problem.place) == (f"config.{code}", key, place)


@pytest.mark.parametrize("text", ["", "seed: 1\n", "defaults: []\n"])
def test_a_configuration_without_sections_names_them(conf: Path, text: str) -> None:
    (conf / "config.yaml").write_text(text, encoding="utf-8")
    with refused_keys(("config.missing_section", "train"), ("config.missing_section", "model")):
        compose_config(conf, [])


def test_files_of_ones_own_that_are_right_compose(conf: Path) -> None:
    write(
        conf,
        {
            "mine/x.yaml": "# @package _global_\n# 我的\ntrain:\n  rank: 4\n  lr_end: 1e-4\n",
            "train/big.yaml": "defaults:\n  - dora\n  - _self_\nscale: ${.rank}\nbatch_size: 1_0\n",
            "broken.yaml": "[",  # no defaults list leads to it
        },
    )
    train = compose_config(conf, ["mine=x", "train=big", "experiment=null"]).train
    assert (train.rank, train.scale, train.method, train.batch_size) == (4, 4.0, "dora", 10)
    assert train.lr_end == 1e-4
    (conf / "config.yaml").write_text(
        (conf / "config.yaml").read_text(encoding="utf-8").replace("  - schema: athanor", "  #"),
        encoding="utf-8",
    )
    assert compose_config(conf, []).train.rank == 8


@pytest.mark.parametrize("text", ["", "seed: 1\n", "train: 5\n"])
def test_params_without_keys_name_them(conf: Path, text: str) -> None:
    Path("params.yaml").write_text(text, encoding="utf-8")
    if not text:
        with refused("config.invalid_params", params=Path("params.yaml")):
            load_config([])
        return
    with refused_keys(("config.missing_section", "data")) as caught:
        load_config([])
    assert len(caught.value.problems) < 10


def test_values_of_params_are_not_resolved(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of the environment is no value, whoever wrote the file."""
    monkeypatch.setenv("SECRET", "seven")
    write_params(compose_config(conf, []), Workspace.here())
    params = Path("params.yaml")
    text = params.read_text(encoding="utf-8")
    params.write_text(text.replace("system: null", "system: ${oc.env:SECRET}"), encoding="utf-8")
    with refused_keys(("config.interpolation", "fuse.system")):
        load_config([])
    with refused_keys(("config.interpolation", "fuse.system")):
        load_config(["train.lr_end=${train.learning_rate}"])
    params.write_text(text, encoding="utf-8")
    assert load_config(["train.lr_end=${train.learning_rate}"]).train.lr_end == 2e-4


def write(conf: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (conf / name).parent.mkdir(exist_ok=True)
        (conf / name).write_text(text, encoding="utf-8")


def refuse(conf: Path, code: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        compose_config(conf, [])
    [problem] = caught.value.problems
    assert problem.code == f"config.{code}", problem
    return problem
