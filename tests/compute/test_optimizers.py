"""Optimizers and learning rates: mlx's own, by name, with options that are checked."""

import inspect
from typing import Any

import mlx.core as mx
import pytest
from omegaconf import OmegaConf

from athanor.compute import optimizers
from athanor.config import rules


def rates(name: str, **changed: Any) -> list[float]:
    settings = {"learning_rate": 1.0, "end": 0.0, "warmup": 0, "updates": 10} | changed
    schedule = optimizers.build_schedule(name, **settings)
    return [float(f"{schedule(mx.array(i, mx.uint64)).item():.4g}") for i in range(10)]


def test_schedules() -> None:
    assert rates("constant") == [1.0] * 10
    assert rates("linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("linear", end=0.5)[-1] == 0.55
    assert rates("cosine")[:6] == [1.0, 0.9755, 0.9045, 0.7939, 0.6545, 0.5]
    assert rates("constant", warmup=3) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates("linear", warmup=8)[6:] == [0.7778, 0.8889, 1.0, 0.5]
    assert all(rate > 0 for name in rules.SCHEDULES for rate in rates(name, warmup=5))


def test_names_are_the_schemas() -> None:
    assert tuple(optimizers.OPTIMIZERS) == rules.OPTIMIZERS


@pytest.mark.parametrize("name", rules.OPTIMIZERS)
def test_every_optimizer_takes_the_options_that_conf_gives_it(name: str, repo: Any) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(repo / "conf/train/lora.yaml"))
    options = config["optimizer_config"][name]
    assert list(optimizers.optimizer_misfits({name: options})) == []
    optimizer = optimizers.build_optimizer(name, options, 0.5)
    assert type(optimizer) is optimizers.OPTIMIZERS[name]
    # Whatever mlx calls a default is conf's too, but for Adafactor, which is to take our rate.
    defaults = inspect.signature(type(optimizer).__init__).parameters
    for key, value in options.items():
        default = defaults[key].default
        if key != "relative_step":
            assert value == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"adan": {}}, "unknown_key"),
        ({"adamw": {"wd": 1}}, "unknown_key"),
        ({"adamw": {"weight_decay": "much"}}, "unlike_default"),
        ({"adam": {"betas": [0.9]}}, "unlike_default"),
        ({"adam": {"betas": [0.9, 2.0]}}, "option_out_of_range"),
        ({"muon": {"ns_steps": 10**9}}, "option_out_of_range"),
        ({"adam": {"bias_correction": 1}}, "unlike_default"),
        ({"sgd": {"nesterov": True}}, "refused_by_mlx"),
        ({"muon": {"ns_steps": 5.0}}, "unlike_default"),
        ({"adamw": {"weight_decay": float("nan")}}, "unlike_default"),
    ],
)
def test_options_that_mlx_would_not_take(options: dict[str, Any], code: str) -> None:
    [problem] = optimizers.optimizer_misfits(options)
    assert problem.code == f"config.{code}"
    assert problem.key.startswith(f"train.optimizer_config.{next(iter(options))}")
