"""The names and values of trials as a person reads them, and as Hydra's overrides."""

import math
import shlex
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

SEED = "seed"
LEARNING_RATE = "train.learning_rate"
LAYERS = "train.num_layers"
ALL_LAYERS = -1
SHORT = {LEARNING_RATE: "lr", LAYERS: "layers"}


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the short name of each key: lr, layers, or its last part where that is unique."""
    keys = list(keys)
    leaves = [SHORT.get(key, key.rpartition(".")[2]) for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def format_value(key: str, value: Any) -> str:
    """Return a value as a person writes it: 3e-4, all (layers), true."""
    if key == LAYERS and value == ALL_LAYERS:
        return "all"
    if isinstance(value, float):
        if value and not 0.01 <= abs(value) < 1e5 and math.isfinite(value):
            digits, _, power = f"{value:.2e}".partition("e")
            return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
        return f"{value:.4g}"
    return printable(value if isinstance(value, str) else as_override(value))


def name_trial(values: dict[str, Any]) -> str:
    """Return the name of a trial: "lr 3e-4, layers all"."""
    if not values:
        return "The configuration"
    short = short_names(values)
    return ", ".join(
        f"{printable(short[key])} {format_value(key, value)}" for key, value in values.items()
    )


def format_loss(value: float | None) -> str:
    """Return a loss with four decimals, or with two digits where those would be zeros."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else f"{value:.2g}"


def printable(text: str) -> str:
    """Return text that any file, page and SVG can hold: control characters as their pictures."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    pictures = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}
    return safe.translate(pictures | dict.fromkeys((0xFFFE, 0xFFFF), 0xFFFD))


def promotion_command(values: dict[str, Any], fixed: Iterable[str]) -> str:
    """Return the command that runs a trial through the pipeline, for a shell.

    Args:
        values: the swept keys' values of the trial.
        fixed: the sweep's other overrides, in Hydra's grammar; those of Hydra itself and of a swept
            key are left out.
    """
    parser = OverridesParser.create()

    def key(text: str) -> str:
        try:
            return str(parser.parse_override(text).key_or_group)
        except HydraException:
            return text.partition("=")[0]

    kept = [
        text
        for text in fixed
        if key(text) not in values and not key(text).startswith(("hydra/", "hydra."))
    ]
    overrides = kept + [f"{name}={as_override(value)}" for name, value in values.items()]
    return " ".join(["uv run dvc exp run", *(f"-S {shlex.quote(text)}" for text in overrides)])


def as_override(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides, which reads it as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    text = str(value)
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if not override.is_sweep_override() and override.value() == text:
            return text
    except HydraException:
        pass
    return QuotedString(text=text, quote=Quote.single).with_quotes()
