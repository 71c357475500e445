"""The choice among trials, and the sentence that explains it."""

import math

import pytest

from athanor.sweep import summary
from athanor.sweep.choice import choose
from athanor.sweep.trial_record import TrialStatus
from support.trials import Page, html, lr


def test_the_lowest_validation_loss_is_chosen() -> None:
    choice = choose([lr(0, 1e-4, 1.3), lr(1, 3e-4, 1.1), lr(2, 1e-3, 1.2)])
    assert choice.trial and choice.trial.number == 1
    assert [candidate.loss for candidate in choice.candidates] == [1.1, 1.2, 1.3]
    assert choice.lead == pytest.approx(0.1)
    assert "lr 3e-4 has the lowest validation loss, 1.1000: 0.1000 below lr 1e-3" in choice.sentence


def test_test_metrics_have_no_part_in_the_choice() -> None:
    worse = lr(0, 1e-4, 1.3, test_loss=0.1, test_exact_match=1.0, test_valid_exact_match=1.0)
    better = lr(1, 3e-4, 1.2, test_loss=9.0, test_exact_match=0.0, val_loss=9.0, best_val_loss=9.0)
    assert choose([worse, better]).trial is better


def test_seeds_are_averaged_and_the_lowest_of_the_best_is_promoted() -> None:
    # The single lowest run belongs to the candidate with the worse mean.
    losses = {1e-4: (1.00, 1.60, 1.60), 3e-4: (1.22, 1.20, 1.24)}
    trials = [
        lr(3 * at + seed, rate, loss, seed)
        for at, (rate, of) in enumerate(losses.items())
        for seed, loss in enumerate(of)
    ]
    choice = choose(trials)
    assert choice.best and choice.best.values == {"train.learning_rate": 3e-4}
    assert choice.best.loss == pytest.approx(1.22)
    assert choice.trial and choice.trial.values["seed"] == 1
    assert choice.lead == pytest.approx(0.18)
    # ((0.4² + 0.2² + 0.2²) + (0² + 0.02² + 0.02²)) / (2 + 2)
    assert choice.spread == pytest.approx(math.sqrt((0.24 + 0.0008) / 4))
    assert choice.pooled == 2
    assert "This lead is not larger than the seeds' spread of 0.2454" in choice.sentence
    assert "Its trial with seed 1 has the lowest loss, 1.2000" in choice.sentence


def test_a_lead_is_compared_with_the_spread_over_seeds() -> None:
    losses = [(1e-4, 1.5), (1e-4, 1.52), (3e-4, 1.2), (3e-4, 1.22)]
    choice = choose([lr(n, rate, loss, n % 2) for n, (rate, loss) in enumerate(losses)])
    assert choice.spread == pytest.approx(0.02 / math.sqrt(2))
    assert "This lead is larger than the seeds' spread of 0.0141" in choice.sentence
    assert "by a factor of 21.2" in choice.sentence


@pytest.mark.parametrize("seed", [None, 0])
def test_one_seed_leaves_chance_unknown(seed: int | None) -> None:
    choice = choose([lr(0, 1e-4, 1.3, seed), lr(1, 3e-4, 1.1, seed)])
    assert choice.spread is None
    assert "not known" in choice.sentence and "seed=0,1,2" in choice.sentence


def test_equal_losses_keep_the_order_of_the_sweep() -> None:
    choice = choose([lr(1, 1e-4, 1.1), lr(0, 3e-4, 1.1), lr(2, 1e-3, 1.1)])
    assert choice.trial and choice.trial.number == 0
    assert choice.lead == 0 and "have the same validation loss" in choice.sentence


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None])
def test_a_loss_that_is_not_finite_never_comes_first(loss: float | None) -> None:
    choice = choose([lr(0, 1e3, loss), lr(1, 1e-4, 5.0), lr(2, 1e-3, loss), lr(3, 3e-4, 4.0)])
    assert [c.trials[0].number for c in choice.candidates] == [3, 1, 0, 2]
    assert choice.lead == 1


@pytest.mark.parametrize("status", [TrialStatus.FAILED, TrialStatus.KILLED])
def test_a_trial_that_did_not_finish_is_not_chosen(status: TrialStatus) -> None:
    choice = choose([lr(0, 1e-4, 1.3), lr(1, 3e-4, 0.1, status=status)])
    assert choice.trial and choice.trial.number == 0
    assert choice.lead is None and "no other configuration finished" in choice.sentence


def test_a_configuration_with_a_failed_seed_is_named_but_not_ranked() -> None:
    trials = [
        lr(0, 1e-4, 1.5, 0),
        lr(1, 1e-4, 1.5, 1),
        lr(2, 3e-4, 1.0, 0),
        lr(3, 3e-4, None, 1, status=TrialStatus.FAILED, reason="the loss is NaN\nTraceback"),
        lr(4, 1e-3, 2.0, 0),
        lr(5, 1e-3, 2.0, 1),
    ]
    choice = choose(trials)
    assert choice.best and choice.best.values == {"train.learning_rate": 1e-4}
    assert choice.second and choice.second.values == {"train.learning_rate": 1e-3}
    mean = "lr 3e-4 has 1.0000 over the 1 of 2 seeds that finished"
    assert mean in choice.sentence and "seed 1 (the loss is NaN)" in choice.sentence
    assert "Traceback" not in choice.sentence
    # Where no configuration has every seed, the best of them is chosen.
    alone = choose(trials[2:4])
    assert alone.trial and alone.trial.number == 2
    assert "No configuration finished with every seed" in alone.sentence


def test_no_choice_without_a_finished_trial() -> None:
    trials = [
        lr(0, 1e-4, None, status=TrialStatus.FAILED, reason="out of memory"),
        lr(1, 3e-4, math.nan),
    ]
    choice = choose(trials)
    assert choice.best is choice.trial is choice.lead is choice.spread is None
    assert "No trial of 2 finished" in choice.sentence
    assert choose([]).candidates == []
    text = Page(html(trials)).text
    assert (
        "No trial of 2 finished" in text and "out of memory" in text and "dvc exp run" not in text
    )
    assert "dvc exp run" not in summary.markdown(trials, [])


def test_a_trial_that_ran_twice_counts_once() -> None:
    trials = [
        lr(0, 1e-4, None, 0, status=TrialStatus.KILLED),
        lr(1, 1e-4, 1.2, 0),
        lr(2, 1e-4, 1.2, 0),
    ]
    [candidate] = choose(trials).candidates
    assert candidate.losses == [1.2] and candidate.complete
