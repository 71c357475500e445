"""What a sweep goes over: the overrides of its command, sorted and checked before any work."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from athanor.config.check import ConfigError
from athanor.config.compose import (
    compose_config,
    config_groups,
    flatten,
    load_config,
    multirun_config,
)
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.prepare.result import DECIDED_BY


@dataclass(frozen=True)
class Space:
    """A sweep's points, as far as they are known before it runs.

    `swept` are its keys (or groups, as `train`), each with its values as Hydra texts, or with the
    two ends of an interval; `typed` are the command's own overrides of them, `fixed` its others,
    `hydra` those of Hydra's own keys; `sweeper` is Hydra's configuration of what chooses the
    points; `total` their number, and `at_once` how many of them this machine trains side by side.
    """

    base: Config
    swept: dict[str, list[str]]
    typed: list[str]
    fixed: list[str]
    hydra: list[str]
    sweeper: dict[str, Any]
    total: int
    at_once: int


def space(conf: Path, arguments: list[str]) -> Space:
    """Sorts the overrides of a sweep's command.

    Raises:
        ConfigError: with every value that is wrong; UserError for what no sweep can go over.
    """
    parser = OverridesParser.create()
    problems: list[str] = []
    typed: list[str] = []
    fixed: list[str] = []
    hydra: list[str] = []
    swept: dict[str, Override] = {}
    groups = config_groups(conf)
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"command line: {text}: {str(error).splitlines()[0]}")
            continue
        key = override.key_or_group
        if key == "sweep" and str(override.value()) not in groups["sweep"]:
            there = ", ".join(groups["sweep"])
            problems.append(f"command line: {text}: conf/sweep/ has no such file; it has {there}")
        elif key.split("/")[0].split(".")[0] == "hydra" or key == "sweep":
            hydra.append(text)
        elif override.is_sweep_override():
            swept[key] = override
            typed.append(text)
        elif key in groups and override.value() is None and not override.is_delete():
            fixed.append(f"~{key}")  # Hydra takes null for a group in a file only
        else:
            fixed.append(text)
    if problems:
        raise ConfigError(problems)
    base = compose_config(conf, fixed)
    sweeper, launcher = _multirun(conf, [*fixed, *hydra])
    given = {parser.parse_override(text).key_or_group for text in fixed}
    for key, text in (sweeper.get("params") or {}).items():
        override = parser.parse_override(f"{key}={text}")
        if key in swept or key in given:
            continue  # the command line wins
        if override.is_sweep_override():
            swept[key] = override
        else:
            fixed.append(f"{key}={text}")
            base = compose_config(conf, fixed)
    if not swept:
        raise UserError(
            "a sweep needs a key with several values, as in\n  uv run python -m athanor.sweep -m "
            "train.learning_rate=1e-4,3e-4 train.num_layers=2,4,-1\nor a named one of conf/sweep/, "
            "as in\n  uv run python -m athanor.sweep sweep=grid"
        )
    values = {key: list(_values(override)) for key, override in swept.items()}
    _refuse_what_trains_nothing(values)
    for key in groups:
        if "null" in values.get(key, []):
            raise UserError(f"{key}: Hydra can't sweep a group to null: make it two sweeps")
    _check(conf, base, fixed, values, arguments)
    if "sampler" in sweeper and sweeper["sampler"].get("seed", base.seed) is None:
        hydra.append(f"hydra.sweeper.sampler.seed={base.seed}")
        sweeper, launcher = _multirun(conf, [*fixed, *hydra])
    if "n_trials" in sweeper and "seed" in swept:
        raise UserError(
            "seed: a search would draw it as it draws the rest; sweep over seed=0,1,2 with the "
            "values that it found best"
        )
    total = sweeper.get("n_trials", 1)
    if "n_trials" not in sweeper:
        for key, override in swept.items():
            if override.value_type is not None and not override.is_discrete_sweep():
                raise UserError(
                    f"{key}: an interval has no end of points: hydra/sweeper=optuna chooses some, "
                    f"as in `uv run python -m athanor.sweep {shlex.join(arguments)} "
                    "hydra/sweeper=optuna`"
                )
            total *= len(values[key])
    at_once = _at_once(launcher, sweeper, total)
    return Space(base, values, typed, fixed, hydra, sweeper, total, at_once)


def refuse_unprepared(found: Space) -> None:
    """Stops where the sweep's data or model are not those that `prepare` was run with.

    Raises:
        UserError: with what differs, and the command that prepares it.
    """
    there, wanted = flatten(load_config([])), flatten(found.base)
    other = [
        f"{key}={wanted[key]}, and prepare was run with {there[key]}"
        for key in wanted
        if key.startswith(DECIDED_BY) and there[key] != wanted[key]
    ]
    if other:
        asked = [text for text in found.fixed if _decides_prepare(text)]
        options = "".join(f" -S {shlex.quote(text)}" for text in asked)
        raise UserError(
            "a sweep trains on what prepare left, and this one asks for other data or another "
            "model:\n  "
            + "\n  ".join(other)
            + f"\nto prepare that: `uv run dvc exp run{options} prepare`"
            + ("" if asked else " (params.yaml holds an experiment's values now)")
        )


def _decides_prepare(text: str) -> bool:
    key = OverridesParser.create().parse_override(text).key_or_group
    return key in ("experiment", "train") or f"{key}.".startswith(DECIDED_BY)


def _at_once(launcher: dict[str, Any], sweeper: dict[str, Any], total: int) -> int:
    """Return how many trials a launcher runs at once on this machine."""
    batch = min(total, sweeper.get("n_jobs") or sweeper.get("max_batch_size") or total)
    jobs = launcher["n_jobs"]
    if jobs is not None:  # joblib's, where -1 is all cores, -2 all but one
        return min(batch, jobs if jobs > 0 else max((os.cpu_count() or 1) + 1 + jobs, 1))
    return batch if str(launcher["_target_"]).endswith(".LocalLauncher") else 1


def _multirun(conf: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return multirun_config(conf, overrides)
    except ConfigError as error:
        if "hydra/sweeper" in str(error) or "hydra/launcher" in str(error):
            raise UserError(
                f"{error}\nOptuna, joblib and submitit come with `uv sync --extra sweep`"
            ) from error
        raise


def _values(override: Override) -> Iterator[str]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        yield from (str(value.start), str(value.end))
        return
    try:
        yield from override.sweep_string_iterator()
    except HydraException as error:  # glob(*)
        raise UserError(f"{override.input_line}: name the values themselves: {error}") from error


def _refuse_what_trains_nothing(values: dict[str, list[str]]) -> None:
    for key in values:
        if key.split(".")[0] in ("test", "fuse"):
            raise UserError(
                f"{key}: a sweep goes over what is trained, and this changes nothing of that; give "
                "it one value (test), or change it where one model is made (fuse)"
            )


def _check(
    conf: Path, base: Config, fixed: list[str], values: dict[str, list[str]], arguments: list[str]
) -> None:
    """Composes each value once, by itself; refuses those that would need another `prepare`."""
    problems: list[str] = []
    needs: list[str] = []
    usual = flatten(base)
    for key, texts in values.items():
        for text in texts:
            try:
                flat = flatten(compose_config(conf, [*fixed, f"{key}={text}"]))
            except ConfigError as error:
                problems += [one for one in error.problems if one not in problems]
                continue
            if flat["train.blas_threads"] != usual["train.blas_threads"]:
                raise UserError(
                    f"{key}: the trials of a sweep share what the frozen layers computed, and so "
                    "one number of BLAS threads; give train.blas_threads one value"
                )
            if key not in needs and any(
                name.startswith(DECIDED_BY) and flat[name] != usual[name] for name in flat
            ):
                needs.append(key)
    if problems:
        raise ConfigError(problems)
    if needs:
        own = [text for text in arguments if not text.startswith(("hydra", "sweep="))]
        there = {text.split("=")[0].lstrip("+") for text in own}
        named = [f"{key}={','.join(texts)}" for key, texts in values.items() if key not in there]
        options = "".join(f" -S {shlex.quote(text)}" for text in [*own, *named])
        raise UserError(
            f"{', '.join(needs)}: the points of a sweep share their data and their model, and this "
            "changes what prepare makes of them; DVC runs every stage of each such point:\n"
            f"  uv run dvc exp run --queue{options}\n"
            "  uv run dvc queue start"
        )
