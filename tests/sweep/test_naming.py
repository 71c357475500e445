"""Names and values of trials, and the command that promotes a trial."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import compose_and_dump, to_hydra_overrides

from athanor.config.compose import read_params
from athanor.sweep.naming import format_value, promotion_command

AWKWARD = [
    "dora",
    "",
    "a b",
    "it's",
    'say "x"',
    "1,2",
    "[1,2]",
    "{a: b}",
    "x=y",
    "a:b",
    "true",
    "null",
    "3",
    "back\\slash\\",
    "\\'",
    "$HOME `ls`",
    "(a|b)",
    "range(1,3)",
    "星期八",
    1e-5,
    0.1 + 0.2,
    5e-324,
    1e22,
    -1,
    0,
    True,
    False,
    None,
    [1, 2.5, "a,b", None],
    {"betas": [0.9, 0.999], "name": "it's"},
]


@pytest.mark.parametrize("value", AWKWARD, ids=repr)
def test_a_promoted_value_survives_the_shell_and_dvc(value: Any) -> None:
    line = promotion_command({"train.key": value}, [])
    words = shlex.split(line)
    assert words[:6] == ["uv", "run", "dvc", "exp", "run", "-S"]
    overrides = to_path_overrides(words[6:])
    assert list(overrides) == ["params.yaml"]
    [override] = to_hydra_overrides(overrides["params.yaml"])
    assert override.key_or_group == "train.key" and not override.is_sweep_override()
    assert override.value() == value and type(override.value()) is type(value)


def test_a_promotion_has_the_fixed_overrides_without_hydras() -> None:
    fixed = [
        "train=dora",
        "train.iters=100",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=12",
        "seed=7",
        "train.learning_rate=1",
        "data.label_prompt='a, b'",
    ]
    line = promotion_command({"train.learning_rate": 3e-4, "train.num_layers": -1}, fixed)
    words = shlex.split(line)[5:]
    assert words[1::2] == [
        "train=dora",
        "train.iters=100",
        "seed=7",
        "data.label_prompt='a, b'",
        "train.learning_rate=0.0003",
        "train.num_layers=-1",
    ]
    assert set(words[::2]) == {"-S"}
    # A seed that was swept is the trial's own.
    assert promotion_command({"seed": 0}, ["seed=7"]) == "uv run dvc exp run -S seed=0"


def test_dvc_composes_a_promotion(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"train.learning_rate": 1e-5, "train.num_layers": 3, "seed": 2}
    line = promotion_command(values, ["train=dora", "test.temp=0.5"])
    overrides = to_path_overrides(shlex.split(line)[6::2])["params.yaml"]
    params = tmp_path / "params.yaml"
    compose_and_dump(params, str(repo / "conf"), None, "config", str(repo), overrides)
    config = read_params(params)
    assert (config.train.learning_rate, config.train.num_layers, config.seed) == (1e-5, 3, 2)
    assert config.train.method == "dora" and config.test.temp == 0.5


def test_values_are_shown_short() -> None:
    rates = [1e-4, 3e-4, 2.3456e-5, 1e-3, 0.01, 0.5, 20.0, 0.0]
    shown = [format_value("train.learning_rate", value) for value in rates]
    assert shown == ["1e-4", "3e-4", "2.35e-5", "1e-3", "0.01", "0.5", "20", "0"]
    assert format_value("train.num_layers", -1) == "all" and format_value("train.rank", -1) == "-1"
    assert format_value("train.mask_prompt", True) == "true"
