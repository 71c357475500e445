"""Random settings over every key: a configuration that can be trained, or problems with places.

uv run pytest -n0 tests/config/test_random_settings.py --settings 2000
"""

import math
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from athanor.compute import optimizers
from athanor.config import schema
from athanor.config.compose import compose_config
from athanor.config.rules import ConfigError
from athanor.config.schema import Config
from athanor.config.values import flatten, optimizer_options, to_dataclass
from athanor.errors import UserError
from athanor.train.plan import TrainingPlan

KEYS = schema.all_keys()
SCALARS = st.one_of(
    st.sampled_from(
        [
            *("???", "null", "true", "''", "${seed}", "${train}", "${x.y}", "${oc.env:HOME}"),
            *("inf", "-inf", "nan", "1e20", "-1e300", "1e-320", "1_000", "010", "0x10", "1:30"),
            *(
                "问题",
                "'问 题'",
                "🙂",
                "a b",
                "[]",
                "{}",
                "{a: 1}",
                "[1, [2, {b: c}]]",
                "{a: {b: 1}}",
            ),
            *(
                "2024-01-01",
                "yes",
                "off",
                "1,2",
                "range(1,9)",
                "a=b",
                "\\udcff",
                "'\\''",
                "../..",
                "~",
            ),
            *("{{ x", "{% for i in x %}", "models/tiny", "x/" + "y" * 200, "auto", "lora", "adamw"),
        ]
    ),
    st.integers(-3, 300).map(str),
    st.sampled_from([2**n + d for n in (31, 32, 53, 63, 64, 200) for d in (-1, 0, 1)]).map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
ENTRIES = st.sampled_from(["", "", "", ".x", ".leak", ".adam.betas", ".muon.ns_steps", ".html.a"])
SETTINGS = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(KEYS), ENTRIES, SCALARS),
    st.builds("{}{}={}".format, st.sampled_from(KEYS), st.just(""), SCALARS),
    st.builds(
        "{}{}".format,
        st.sampled_from(["~", "+", "++", "--", "-", "hydra.", "@", ""]),
        st.sampled_from([*KEYS, *schema.SECTIONS, "experiment", "sweep", "nothing"]),
    ),
    st.builds(
        "{}={}".format,
        st.sampled_from([*schema.SECTIONS, "experiment", "sweep", "nothing", "a.b", "x@y"]),
        SCALARS,
    ),
)


@pytest.fixture(autouse=True)
def workspace(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository as the current folder."""
    monkeypatch.chdir(repo)


def test_random_settings_are_a_configuration_or_problems(
    repo: Path, request: pytest.FixtureRequest
) -> None:
    """Compose lists of random settings: none ends in a traceback.

    2,000 of them: `uv run pytest -n0 tests/config/test_random_settings.py --settings 2000`.
    """
    outcomes = {True: 0, False: 0}

    @settings(
        max_examples=request.config.getoption("--settings"),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(SETTINGS, min_size=1, max_size=3))
    def compose(texts: list[str]) -> None:
        try:
            config = compose_config(Path("conf"), texts)
        except ConfigError as error:
            outcomes[False] += 1
            assert error.problems
            for problem in error.problems:
                assert problem.key or problem.place
                assert str(problem).encode("utf-8", "surrogateescape")
        else:
            outcomes[True] += 1
            check_that_it_trains(config)

    compose()
    assert min(outcomes.values()) > 0


def check_that_it_trains(config: Config) -> None:
    """Hold values against their types, and make what a training makes of them."""
    for key, value in flatten(config).items():
        check_type(key, value)
    to_dataclass(config)
    try:
        plan = TrainingPlan.from_config(config, batches_per_epoch=1)
    except UserError as error:
        assert error.code == "train.too_many_iterations"
        return
    train = config.train
    rate = optimizers.build_schedule(
        train.lr_schedule, train.learning_rate, train.lr_end, train.warmup, plan.updates
    )
    optimizer = optimizers.build_optimizer(train.optimizer, optimizer_options(config), rate)
    weights = {"a": mx.ones((2, 2))}
    optimizer.init(weights)
    mx.eval(optimizer.apply_gradients({"a": mx.ones((2, 2))}, weights))
    mx.random.seed(config.seed)
    np.random.default_rng([config.seed, 1])


def check_type(key: str, value: Any) -> None:
    kind = schema.key_type(key)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    assert isinstance(value, tuple(get_origin(each) or each for each in kinds)), (key, value)
    if isinstance(value, float):
        assert math.isfinite(value)
