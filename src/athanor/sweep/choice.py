"""The choice among a sweep's trials, and the sentence that explains it.

Reads and writes nothing. The choice takes the validation loss and no test metric: the test metrics
of the chosen trial could no longer tell how good it is on new rows if they had chosen it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from athanor.sweep.naming import SEED, format_loss, format_value, name_trial, printable
from athanor.sweep.trial_record import TrialStatus

LOSS = "kept_val_loss"


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep with its measurements.

    Attributes:
        number: its place in the sweep, from 0.
        values: the swept keys' values; a key is dotted, or a config group's name.
        reason: the cause of a failure, a line or more.
        metrics: the last of each; kept_val_loss is the validation loss, in nats a token, of the
            adapters that are kept.
        history: the rows of history.csv: iteration, and train_loss and val_loss where present.
    """

    number: int
    values: dict[str, Any]
    status: TrialStatus
    reason: str | None
    metrics: dict[str, float]
    history: list[dict[str, float]]

    @property
    def loss(self) -> float:
        """The loss to choose by; inf where the trial did not finish or its loss is not finite."""
        loss = self.metrics.get(LOSS, math.inf)
        return loss if self.status is TrialStatus.FINISHED and math.isfinite(loss) else math.inf

    @property
    def has_loss(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def seed(self) -> Any:
        return self.values.get(SEED)

    @property
    def outcome(self) -> str:
        """The status in a word or two."""
        if self.status is TrialStatus.FINISHED:
            return "finished" if self.has_loss else "no loss"
        return "failed" if self.status is TrialStatus.FAILED else "stopped"

    @property
    def fault(self) -> str:
        """The reason in a line for which the trial has no loss; empty where it has one."""
        if self.has_loss:
            return ""
        if self.reason and self.reason.strip():
            return printable(self.reason.strip().splitlines()[0])
        if self.status is TrialStatus.FINISHED:
            return f"its validation loss is {self.metrics.get(LOSS, 'not recorded')}"
        failed = self.status is TrialStatus.FAILED
        return "no reason was recorded" if failed else "it was stopped"


@dataclass(frozen=True)
class Candidate:
    """A configuration: the trials that differ only in the seed; `values` are theirs without it."""

    values: dict[str, Any]
    trials: list[Trial]

    @property
    def finished(self) -> list[Trial]:
        """The trials with a loss, the lowest first."""
        return sorted((t for t in self.trials if t.has_loss), key=lambda trial: trial.loss)

    @property
    def losses(self) -> list[float]:
        return [trial.loss for trial in self.finished]

    @property
    def loss(self) -> float:
        """The mean over the seeds that finished; inf where none did."""
        return fmean(self.losses) if self.losses else math.inf

    @property
    def complete(self) -> bool:
        return len(self.losses) == len(self.trials)

    @property
    def outcome(self) -> str:
        """The outcomes of the trials without a loss, in words."""
        return " or ".join(sorted({trial.outcome for trial in self.trials if not trial.has_loss}))

    @property
    def spread(self) -> float | None:
        """The standard deviation of the losses over seeds (n - 1); None with fewer than two."""
        return _pooled_spread([self])

    def metric(self, name: str) -> list[float]:
        """Return a metric of the trials that finished and have it."""
        return [trial.metrics[name] for trial in self.finished if name in trial.metrics]

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the trials that finished and have it."""
        values = self.metric(name)
        return fmean(values) if values else None


@dataclass(frozen=True)
class Choice:
    """The result of a sweep.

    Attributes:
        candidates: first those whose seeds all finished by their loss, then those that lack a seed
            by theirs, then those without a loss.
        best: the first candidate, if it has a loss; `trial` is its trial with the lowest loss.
        second: the next candidate that finished as fully.
        lead: the second's loss minus the best's, in nats a token.
        spread: the standard deviation of the loss over seeds, pooled over the `pooled` candidates
            that finished with two or more.
    """

    candidates: list[Candidate]
    best: Candidate | None
    trial: Trial | None
    second: Candidate | None
    lead: float | None
    spread: float | None
    pooled: int

    @property
    def trials(self) -> list[Trial]:
        """All trials by number."""
        trials = [trial for candidate in self.candidates for trial in candidate.trials]
        return sorted(trials, key=lambda trial: trial.number)

    @property
    def without_loss(self) -> list[Trial]:
        """The trials without a loss by number."""
        return [trial for trial in self.trials if not trial.has_loss]

    @property
    def keys(self) -> list[str]:
        """The swept keys, the seed apart."""
        return list(dict.fromkeys(key for c in self.candidates for key in c.values))

    @property
    def sentence(self) -> str:
        """The reason for the choice, how certain it is, and the configurations not ranked."""
        best, trial = self.best, self.trial
        if best is None or trial is None:
            count = len(self.trials)
            return f"No trial of {count} finished with a validation loss, so none is chosen."
        sentences = [_compare(self, best)]
        if self.lead:
            sentences.append(_certainty(self.lead, self.spread, self.pooled))
        sentences += _not_ranked(self, best)
        if len(best.losses) > 1:
            sentences.append(
                f"Its trial with seed {format_value(SEED, trial.seed)} has the lowest loss, "
                f"{format_loss(trial.loss)}, and is the one to promote."
            )
        return " ".join(sentences)


def choose(trials: Iterable[Trial]) -> Choice:
    """Return the choice of the configuration with the lowest validation loss, averaged over seeds.

    A configuration that lacks a seed comes after those whose seeds all finished, however low its
    loss is: a training that fails has no low loss, so leaving it out of the mean would flatter.
    The sentence names those that would have come first. Equal losses keep the order of the sweep.
    """
    candidates = sorted(_group_by_seed(trials), key=_rank)
    several = [candidate for candidate in candidates if len(candidate.losses) > 1]
    best, second = [*(candidate for candidate in candidates if candidate.losses), None, None][:2]
    if best and second and best.complete != second.complete:
        second = None
    return Choice(
        candidates=candidates,
        best=best,
        trial=best.finished[0] if best else None,
        second=second,
        lead=second.loss - best.loss if best and second else None,
        spread=_pooled_spread(several),
        pooled=len(several),
    )


def _group_by_seed(trials: Iterable[Trial]) -> list[Candidate]:
    """Return the trials by all values but the seed; of two equal ones the one with a loss."""
    groups: dict[str, dict[str, Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        seeds = groups.setdefault(repr(sorted(_without_seed(trial).items())), {})
        before = seeds.get(repr(trial.seed))
        if before is None or not before.has_loss:
            seeds[repr(trial.seed)] = trial
    trials_of = [list(seeds.values()) for seeds in groups.values()]
    return [Candidate(_without_seed(trials[0]), trials) for trials in trials_of]


def _without_seed(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.values.items() if key != SEED}


def _rank(candidate: Candidate) -> tuple[bool, bool, float, int]:
    first = min(trial.number for trial in candidate.trials)
    return (not candidate.losses, not candidate.complete, candidate.loss, first)


def _pooled_spread(candidates: list[Candidate]) -> float | None:
    """Return sqrt(sum of squared distances from each candidate's mean / sum of (seeds - 1))."""
    squares, degrees = 0.0, 0
    for candidate in candidates:
        squares += sum((loss - candidate.loss) ** 2 for loss in candidate.losses)
        degrees += max(len(candidate.losses) - 1, 0)
    return math.sqrt(squares / degrees) if degrees else None


def _compare(choice: Choice, best: Candidate) -> str:
    name, loss = name_trial(best.values), format_loss(best.loss) + _over_seeds(best)
    if len(choice.candidates) == 1:
        spread = f", with a standard deviation of {format_loss(best.spread)}" if best.spread else ""
        return f"{name} has a validation loss of {loss}{spread}; it is the only configuration."
    if choice.second is None or choice.lead is None:
        return f"{name} has a validation loss of {loss}; no other configuration finished."
    second = name_trial(choice.second.values)
    if [len(choice.second.losses), len(choice.second.trials)] != [
        len(best.losses),
        len(best.trials),
    ]:
        second += _over_seeds(choice.second)
    if choice.lead == 0:
        return (
            f"{name} and {second} have the same validation loss, {loss}; the first in the sweep is "
            "chosen."
        )
    lead = format_loss(choice.lead)
    return f"{name} has the lowest validation loss, {loss}: {lead} below {second}."


def _over_seeds(candidate: Candidate) -> str:
    """Return the number of seeds that a loss is the mean of, in words; empty for a single one."""
    finished, total = len(candidate.losses), len(candidate.trials)
    if candidate.complete:
        return f" on average over {finished} seeds" if finished > 1 else ""
    return f" over the {finished} of {total} seeds that finished"


def _certainty(lead: float, spread: float | None, pooled: int) -> str:
    if spread is None:
        return (
            "No configuration finished with two seeds, so it is not known whether this is more "
            "than chance; sweep the first few over seed=0,1,2 to find out."
        )
    over = "of one configuration" if pooled == 1 else f"pooled over {pooled} configurations"
    deviation = f"{format_loss(spread)} (the standard deviation of the loss over seeds, {over})"
    if lead > spread:
        times = f", by a factor of {lead / spread:.1f}" if spread else ""
        return f"This lead is larger than the seeds' spread of {deviation}{times}."
    return (
        f"This lead is not larger than the seeds' spread of {deviation}; other seeds may reverse "
        "the order."
    )


def _not_ranked(choice: Choice, best: Candidate) -> list[str]:
    """Return a sentence for each configuration that lacks a seed and has a loss as low."""
    sentences = []
    bar = choice.second.loss if choice.second else math.inf
    for candidate in choice.candidates:
        if candidate.complete or not candidate.losses:
            continue
        failed = next(trial for trial in candidate.trials if not trial.has_loss)
        why = f"seed {format_value(SEED, failed.seed)} ({failed.fault})"
        if candidate is best:
            sentences.append(f"No configuration finished with every seed; this one lacks {why}.")
        elif best.complete and candidate.loss < bar:
            sentences.append(
                f"{name_trial(candidate.values)} has {format_loss(candidate.loss)}"
                f"{_over_seeds(candidate)}; a configuration with a failed seed is not ranked "
                f"against those whose seeds all finished: it lacks {why}."
            )
    return sentences
