"""Optimizers and learning-rate schedules: mlx's own, under mlx-lm's names."""

from collections.abc import Callable, Iterator
from inspect import signature
from math import isfinite
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from athanor.errors import Problem, nearest

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
    "muon": optim.Muon,
}

# Bounds of options: decays of moments; steps of muon's iteration, which has converged by then; and
# all others, of which none is sensible beyond 10.
MOST_OF_SHARES, MOST_STEPS, MOST = 1, 100, 1e6

Schedule = Callable[[mx.array], mx.array]


def build_optimizer(
    name: str, options: dict[str, Any], learning_rate: "float | Schedule"
) -> optim.Optimizer:
    """Return a new optimizer by its name in OPTIMIZERS, with mlx.optimizers' options."""
    return OPTIMIZERS[name](learning_rate=learning_rate, **options)


def build_schedule(
    name: str, learning_rate: float, end: float, warmup: int, updates: int
) -> Schedule:
    """Return the learning rate as a function of the update, counted from 0.

    It rises linearly over `warmup` updates, none of them at 0, to `learning_rate`; then it stays
    there (constant), or falls towards `end` at `updates` in a straight line or half a cosine wave
    (Loshchilov & Hutter 2017).
    """
    falling = max(1, updates - warmup)
    after: Schedule = {
        "constant": lambda _: mx.array(learning_rate),
        "linear": optim.linear_schedule(learning_rate, end, falling),
        "cosine": optim.cosine_decay(learning_rate, falling, end),
    }[name]
    if not warmup:
        return after
    rising = optim.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    joined: Schedule = optim.join_schedules([rising, after], [warmup])
    return joined


def optimizer_misfits(options: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Yield a problem for each option in train.optimizer_config that mlx would not take."""
    section = "train.optimizer_config"
    for name, values in options.items():
        if name not in OPTIMIZERS:
            yield Problem(
                "config.unknown_key", f"{section}.{name}", candidates=nearest(name, OPTIMIZERS)
            )
            continue
        known = dict(signature(OPTIMIZERS[name].__init__).parameters)
        known = {key: known[key] for key in known if key not in ("self", "learning_rate")}
        refused = False
        for key, value in values.items():
            if key not in known:
                refused = True
                yield Problem(
                    "config.unknown_key", f"{section}.{name}.{key}", candidates=nearest(key, known)
                )
            elif not _same_type(value, known[key].default):
                refused = True
                default = known[key].default
                yield Problem(
                    "config.unlike_default",
                    f"{section}.{name}.{key}",
                    default=repr(default),
                    value=repr(value),
                )
            elif not _in_range(key, value):
                refused = True
                yield Problem(
                    "config.option_out_of_range",
                    f"{section}.{name}.{key}",
                    range=_describe_range(key),
                    value=repr(value),
                )
        if not refused:
            try:
                build_optimizer(name, values, 1.0)
            except ValueError as error:
                yield Problem("config.refused_by_mlx", f"{section}.{name}", error=str(error))


def _is_share(key: str) -> bool:
    """Return whether an option is a decay of a moment: at 1, it would never change."""
    return key.startswith("beta") or key == "momentum"


def _describe_range(key: str) -> str:
    if _is_share(key):
        return f"at least 0 and below {MOST_OF_SHARES}"
    return f"at most {MOST_STEPS if key == 'ns_steps' else MOST:g}"


def _in_range(key: str, value: Any) -> bool:
    """Return whether the numbers of an option are some that an optimizer can compute with."""
    if isinstance(value, list | tuple):
        return all(_in_range(key, each) for each in value)
    if value is None or isinstance(value, bool):
        return True
    if _is_share(key):
        return 0 <= value < MOST_OF_SHARES
    return abs(value) <= (MOST_STEPS if key == "ns_steps" else MOST)


def _same_type(value: Any, default: Any) -> bool:
    """Return whether an option's value has the type of its default."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(default)
            and all(map(_same_type, value, default))
        )
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (number and isfinite(value)) or (default is None and value is None)
