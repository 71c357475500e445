"""What a sweep's points came to, which of them is chosen, and the command that promotes it.

Reads and writes nothing. The choice looks at the validation loss and at no test figure: those are
of the chosen alone, and would no longer say how good it is on new rows if they had chosen it.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

SEED = "seed"
LEARNING_RATE = "train.learning_rate"
LAYERS = "train.num_layers"
LOSS = "kept_val_loss"
SHORT = {LEARNING_RATE: "lr", LAYERS: "layers"}
ALL_LAYERS = -1


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    `number` is its place in the sweep, from 0; `values` are the swept keys' (dotted, or a config
    group's name). `reason` is why it failed, a line or more. `metrics` holds the last of each:
    kept_val_loss is the validation loss, in nats a token, of the adapters that are kept.
    `history` holds the rows of history.csv: iteration, and train_loss and val_loss where there is
    one.
    """

    number: int
    values: dict[str, Any]
    status: str
    reason: str | None
    metrics: dict[str, float]
    history: list[dict[str, float]]

    @property
    def loss(self) -> float:
        """The loss to choose by; inf where the point did not finish or its loss is no number."""
        loss = self.metrics.get(LOSS, math.inf)
        return loss if self.status == FINISHED and math.isfinite(loss) else math.inf

    @property
    def measured(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def seed(self) -> Any:
        return self.values.get(SEED)

    @property
    def fault(self) -> str | None:
        """Why the point has no loss, in a line; None where it has one."""
        if self.measured:
            return None
        if self.reason and self.reason.strip():
            return self.reason.strip().splitlines()[0]
        if self.status == FINISHED:
            return f"its validation loss is {self.metrics.get(LOSS, 'not recorded')}"
        return "no reason was recorded" if self.status == FAILED else "it was stopped"


@dataclass(frozen=True)
class Candidate:
    """The points that differ in nothing but the seed, by number; `values` are theirs without it."""

    values: dict[str, Any]
    points: list[Point]

    @property
    def finished(self) -> list[Point]:
        """Those with a loss, the lowest first."""
        found = [point for point in self.points if point.measured]
        return sorted(found, key=lambda point: point.loss)

    @property
    def losses(self) -> list[float]:
        return [point.loss for point in self.finished]

    @property
    def loss(self) -> float:
        """The mean over the seeds that finished; inf where none did."""
        return fmean(self.losses) if self.losses else math.inf

    @property
    def complete(self) -> bool:
        return len(self.losses) == len(self.points)

    @property
    def failed(self) -> bool:
        return any(point.status == FAILED for point in self.points)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the losses over seeds (n - 1); None with fewer than two."""
        return _pooled([self])

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over the points that finished and have it."""
        found = [p.metrics[metric] for p in self.finished if metric in p.metrics]
        return fmean(found) if found else None


@dataclass(frozen=True)
class Choice:
    """What a sweep says.

    `candidates` are in order: those that finished with every seed by their loss, then those that
    lack a seed by theirs, then those without any. `best` is the first of them if it has a loss, and
    `run` that of its points which has the lowest. `second` is the next that finished as fully, and
    `lead` how far its loss is above the best's, in nats a token. `spread` is the standard deviation
    of the loss over seeds, pooled over the `pooled` candidates that finished with two or more.
    """

    candidates: list[Candidate]
    best: Candidate | None
    run: Point | None
    second: Candidate | None
    lead: float | None
    spread: float | None
    pooled: int

    @property
    def sentence(self) -> str:
        """Why the best is chosen, how sure that is, and what was left out of it."""
        return _sentence(self)


def choose(points: Iterable[Point]) -> Choice:
    """The candidate with the lowest validation loss, averaged over its seeds.

    One that lacks a seed can't be chosen over one that has them all, however low its loss is: a
    training that fails is none of those with a low loss, so that leaving it out flatters. The
    sentence names those that would have come before. Equal losses leave the order of the sweep.
    """
    candidates = sorted(_candidates(points), key=_order)
    several = [candidate for candidate in candidates if len(candidate.losses) > 1]
    best, second = [*(found for found in candidates if found.losses), None, None][:2]
    if best and second and best.complete != second.complete:
        second = None
    return Choice(
        candidates=candidates,
        best=best,
        run=best.finished[0] if best else None,
        second=second,
        lead=second.loss - best.loss if best and second else None,
        spread=_pooled(several),
        pooled=len(several),
    )


def promotion(values: dict[str, Any], fixed: Iterable[str]) -> str:
    """The command that runs a point through the pipeline, for a shell.

    Args:
        values: the swept keys' values of the point.
        fixed: the sweep's other overrides, in Hydra's grammar; those of Hydra itself are left out,
            and so are those of a swept key.
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
    overrides = kept + [f"{name}={override(value)}" for name, value in values.items()]
    return " ".join(["uv run dvc exp run", *(f"-S {shlex.quote(text)}" for text in overrides)])


def override(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, which reads it as the same value again."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{override(item)}" for key, item in value.items()) + "}"
    text = str(value)
    try:
        plain = OverridesParser.create().parse_override(f"key={text}")
        if not plain.is_sweep_override() and plain.value() == text:
            return text
    except HydraException:
        pass
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def names(keys: Iterable[str]) -> dict[str, str]:
    """What each swept key is called: lr, layers, or its last part where no other has the same."""
    keys = list(keys)
    leaves = [SHORT.get(key, key.rpartition(".")[2]) for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def shown(key: str, value: Any) -> str:
    """A value as a person writes it: 3e-4, all layers, true."""
    if key == LAYERS and value == ALL_LAYERS:
        return "all"
    if isinstance(value, float):
        if value and not 0.01 <= abs(value) < 1e5 and math.isfinite(value):
            digits, _, power = f"{value:.2e}".partition("e")
            return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
        return f"{value:.4g}"
    return plain(override(value) if not isinstance(value, str) else value)


def called(values: dict[str, Any]) -> str:
    """A point's name: "lr 3e-4, layers all"."""
    if not values:
        return "The configuration"
    short = names(values)
    return ", ".join(f"{plain(short[key])} {shown(key, value)}" for key, value in values.items())


def figure(value: float | None) -> str:
    """A loss with four decimals, or two digits where that would say nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else f"{value:.2g}"


def plain(text: str) -> str:
    """Text that any file, page and SVG can hold: control characters as their pictures."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    pictures = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}
    return safe.translate(pictures | dict.fromkeys((0xFFFE, 0xFFFF), 0xFFFD))


def _candidates(points: Iterable[Point]) -> list[Candidate]:
    """The points by all values but the seed; of those that were run twice the one with a loss."""
    found: dict[str, dict[str, Point]] = {}
    for point in sorted(points, key=lambda point: point.number):
        others = {key: value for key, value in point.values.items() if key != SEED}
        seeds = found.setdefault(repr(sorted(others.items())), {})
        before = seeds.get(repr(point.seed))
        if before is None or not before.measured:
            seeds[repr(point.seed)] = point
    return [
        Candidate(
            {key: v for key, v in next(iter(seeds.values())).values.items() if key != SEED},
            list(seeds.values()),
        )
        for seeds in found.values()
    ]


def _order(candidate: Candidate) -> tuple[bool, bool, float, int]:
    first = min(point.number for point in candidate.points)
    return (not candidate.losses, not candidate.complete, candidate.loss, first)


def _pooled(candidates: list[Candidate]) -> float | None:
    """sqrt(sum of squared distances from each candidate's mean / sum of (seeds - 1))."""
    squares, degrees = 0.0, 0
    for candidate in candidates:
        squares += sum((loss - candidate.loss) ** 2 for loss in candidate.losses)
        degrees += max(len(candidate.losses) - 1, 0)
    return math.sqrt(squares / degrees) if degrees else None


def _sentence(choice: Choice) -> str:
    best, run = choice.best, choice.run
    if best is None or run is None:
        count = sum(len(candidate.points) for candidate in choice.candidates)
        return f"No point of {count} finished with a validation loss, so none is chosen."
    said = [_first(choice, best)]
    if choice.lead:
        said.append(_certainty(choice.lead, choice.spread, choice.pooled))
    said += _left_out(choice, best)
    if len(best.losses) > 1:
        said.append(
            f"Its run with seed {shown(SEED, run.seed)} has the lowest, {figure(run.loss)}, and is "
            "the one to promote."
        )
    return " ".join(said)


def _first(choice: Choice, best: Candidate) -> str:
    loss = figure(best.loss) + _over(best)
    if len(choice.candidates) == 1:
        spread = f", with a standard deviation of {figure(best.spread)}" if best.spread else ""
        return f"{called(best.values)} has a validation loss of {loss}{spread}; there is no other."
    if choice.second is None or choice.lead is None:
        return f"{called(best.values)} has a validation loss of {loss}; no other finished with one."
    second = called(choice.second.values) + _over(choice.second, best)
    if choice.lead == 0:
        return (
            f"{called(best.values)} and {second} have the same validation loss, {loss}; the first "
            "in the sweep is taken."
        )
    return (
        f"{called(best.values)} has the lowest validation loss, {loss}: {figure(choice.lead)} "
        f"below {second}."
    )


def _over(candidate: Candidate, beside: Candidate | None = None) -> str:
    """How many seeds a loss is the mean of, where that is not plain."""
    seeds, all_of_them = len(candidate.losses), len(candidate.points)
    if beside and (seeds, all_of_them) == (len(beside.losses), len(beside.points)):
        return ""
    if candidate.complete:
        return f" on average over {seeds} seeds" if seeds > 1 else ""
    return f" over the {seeds} of {all_of_them} seeds that finished"


def _certainty(lead: float, spread: float | None, pooled: int) -> str:
    if spread is None:
        return (
            "Whether that is more than chance is not known, because no candidate finished with two "
            "seeds: a sweep over seed=0,1,2 of the first few tells."
        )
    over = "of one candidate" if pooled == 1 else f"pooled over {pooled} candidates"
    what = f"seeds' spread of {figure(spread)} (the loss's standard deviation over seeds, {over})"
    if lead > spread:
        times = f", {lead / spread:.1f} times it" if spread else ""
        return f"That lead is larger than the {what}{times}."
    return f"That lead is not larger than the {what}: other seeds may turn the order."


def _left_out(choice: Choice, best: Candidate) -> list[str]:
    """Those that lack a seed and would come before the second if that did not matter."""
    said = []
    bar = choice.second.loss if choice.second else math.inf
    for candidate in choice.candidates:
        if candidate.complete or not candidate.losses:
            continue
        lacking = next(point for point in candidate.points if not point.measured)
        why = f"seed {shown(SEED, lacking.seed)} ({plain(lacking.fault or '')})"
        if candidate is best:
            said.append(f"No candidate finished with every seed; this one lacks {why}.")
        elif best.complete and candidate.loss < bar:
            said.append(
                f"{called(candidate.values)} has {figure(candidate.loss)}{_over(candidate)}; it is "
                f"not set against the others because it lacks {why}."
            )
    return said
