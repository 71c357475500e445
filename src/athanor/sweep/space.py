"""The search space of a sweep: the overrides of its command, sorted and checked before any work."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from athanor.config.compose import compose_config, load_config, multirun_config
from athanor.config.conf_files import ConfFiles, config_groups
from athanor.config.overrides import parse_override, unknown_option, unreadable_override
from athanor.config.rules import ConfigError
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.errors import Problem, UserError
from athanor.paths import Workspace
from athanor.prepare.result import DECIDED_BY
from athanor.train.plan import refuse_too_many_iterations

# More trials, or values of a key, than any machine trains.
MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Space:
    """The trials of a sweep, as far as they are known before it runs.

    Attributes:
        base: the configuration without the swept values.
        swept: the swept keys, or groups such as `train`, each with its values as Hydra texts, or
            with the two ends of an interval.
        typed: the command's own overrides of those; `fixed` are its others, `hydra` those of
            Hydra's own keys.
        sweeper: Hydra's configuration of the sweeper, which chooses the trials.
        total: the number of trials; `at_once` of them this machine trains side by side.
    """

    base: Config
    swept: dict[str, list[str]]
    typed: list[str]
    fixed: list[str]
    hydra: list[str]
    sweeper: dict[str, Any]
    total: int
    at_once: int


def read_space(conf: Path, arguments: list[str]) -> Space:
    """Return the space that a sweep's command describes.

    Raises:
        ConfigError: with every invalid value; UserError for keys that can't be swept.
    """
    problems: list[Problem] = []
    typed: list[str] = []
    fixed: list[str] = []
    hydra: list[str] = []
    swept: dict[str, Override] = {}
    groups = config_groups(conf)
    selected = ConfFiles.follow(conf, {}).selected
    for text in arguments:
        try:
            override = parse_override(text)
        except HydraException as error:
            problems.append(unreadable_override(text, error))
            continue
        key, text = override.key_or_group, override.input_line or text
        if key in groups and key not in selected and not text.startswith(("+", "~")):
            text = f"+{text}"  # a group that the defaults list of config.yaml does not have
        if key == "sweep" and text.partition("=")[2] not in groups["sweep"]:
            problems.append(unknown_option(text, key, text.partition("=")[2], groups[key]))
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
    fixed_keys = {parse_override(text).key_or_group for text in fixed}
    for key, text in (sweeper.get("params") or {}).items():
        try:
            override = parse_override(f"{key}={text}")
        except HydraException as error:
            raise ConfigError([unreadable_override(f"{key}={text}", error)]) from error
        if key in swept or key in fixed_keys:
            continue  # the command line wins
        if override.is_sweep_override():
            swept[key] = override
        else:
            fixed.append(f"{key}={text}")
            base = compose_config(conf, fixed)
    if not swept:
        raise UserError("sweep.nothing_swept")
    values = {key: list(_values(override)) for key, override in swept.items()}
    for key in values:
        if key.split(".")[0] in ("test", "fuse"):
            raise UserError("sweep.key_trains_nothing", key=key)
        if key in groups and "null" in values[key]:
            raise UserError("sweep.group_without_option", key=key)
    if "n_trials" in sweeper and "seed" in swept:
        raise UserError("sweep.seed_in_a_search")
    total = sweeper.get("n_trials", 1)
    if not isinstance(total, int) or total < 1:
        raise UserError("sweep.no_trials", value=total)
    if "n_trials" not in sweeper:
        for key, override in swept.items():
            if override.value_type is not None and not override.is_discrete_sweep():
                raise UserError("sweep.endless_interval", key=key, arguments=shlex.join(arguments))
            total *= len(values[key])
    if total > MOST_TRIALS:
        raise UserError("sweep.too_many_trials", trials=total, most=MOST_TRIALS)
    _check_values(conf, base, fixed, values, arguments)
    if "sampler" in sweeper and sweeper["sampler"].get("seed", base.seed) is None:
        hydra.append(f"hydra.sweeper.sampler.seed={base.seed}")
        sweeper, launcher = _multirun(conf, [*fixed, *hydra])
    at_once = _count_at_once(launcher, sweeper, total)
    return Space(base, values, typed, fixed, hydra, sweeper, total, at_once)


def refuse_unprepared(space: Space) -> None:
    """Raise UserError where the sweep's data or model are not those that `prepare` was run with.

    It names the differences, and the command that prepares them.
    """
    prepared, wanted = flatten(load_config([])), flatten(space.base)
    different = [
        f"{key}={wanted[key]} (prepared: {prepared[key]})"
        for key in wanted
        if key.startswith(DECIDED_BY) and prepared[key] != wanted[key]
    ]
    if not different:
        return
    options = "".join(f" -S {shlex.quote(text)}" for text in space.fixed if _decides_prepare(text))
    if options:
        raise UserError("sweep.other_rows", different=different, options=options)
    raise UserError("sweep.other_rows_by_params", different=different)


def _decides_prepare(text: str) -> bool:
    key = parse_override(text).key_or_group
    return key in ("experiment", "train") or f"{key}.".startswith(DECIDED_BY)


def _count_at_once(launcher: dict[str, Any], sweeper: dict[str, Any], total: int) -> int:
    """Return how many trials a launcher runs at once on this machine."""
    batch = min(total, sweeper.get("n_jobs") or sweeper.get("max_batch_size") or total)
    jobs = launcher["n_jobs"]
    if jobs is not None:  # joblib's, where -1 is all cores, -2 all but one
        return min(batch, jobs if jobs > 0 else max((os.cpu_count() or 1) + 1 + jobs, 1))
    return batch if str(launcher["_target_"]).endswith(".LocalLauncher") else 1


def _multirun(conf: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Hydra's configurations of the sweeper and of the launcher."""
    try:
        return multirun_config(conf, overrides)
    except ConfigError as error:
        if "hydra/sweeper" in str(error) or "hydra/launcher" in str(error):
            raise UserError("sweep.missing_extra", problem=str(error)) from error
        raise


def _values(override: Override) -> Iterator[str]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        yield from (str(value.start), str(value.end))
        return
    try:
        for number, text in enumerate(override.sweep_string_iterator()):
            if number == MOST_TRIALS:  # of a range
                key = override.key_or_group
                raise UserError("sweep.too_many_values", key=key, most=MOST_TRIALS)
            yield text
    except HydraException as error:  # glob(*)
        shown = override.input_line
        raise UserError("sweep.no_list_of_values", override=shown, problem=str(error)) from error


def _check_values(
    conf: Path, base: Config, fixed: list[str], values: dict[str, list[str]], arguments: list[str]
) -> None:
    """Compose each value by itself; raise UserError for those that need another `prepare`."""
    problems: list[Problem] = []
    needs: list[str] = []
    usual = flatten(base)
    epochs, batch_sizes = [usual["train.epochs"] or 0], [usual["train.batch_size"]]
    for key, texts in values.items():
        for text in texts:
            try:
                flat = flatten(compose_config(conf, [*fixed, f"{key}={text}"]))
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
                continue
            epochs.append(flat["train.epochs"] or 0)
            batch_sizes.append(flat["train.batch_size"])
            if flat["train.blas_threads"] != usual["train.blas_threads"]:
                raise UserError("sweep.blas_threads_differ", key=key)
            if key not in needs and any(
                name.startswith(DECIDED_BY) and flat[name] != usual[name] for name in flat
            ):
                needs.append(key)
    if problems:
        raise ConfigError(problems)
    refuse_too_many_iterations(Workspace.here(), max(epochs), min(batch_sizes))
    if needs:
        own = [text for text in arguments if not text.startswith(("hydra", "sweep="))]
        typed = {text.split("=")[0].lstrip("+") for text in own}
        named = [f"{key}={','.join(texts)}" for key, texts in values.items() if key not in typed]
        options = "".join(f" -S {shlex.quote(text)}" for text in [*own, *named])
        raise UserError("sweep.needs_prepare", keys=needs, options=options)
