"""Results that trials on one base share."""

from pathlib import Path
from typing import Any

import pytest

from athanor.chat.base import load_with_tokenizer
from athanor.config.compose import compose_config
from athanor.model.adapters import make_trainable
from athanor.model.load import copy_sharing_weights
from athanor.paths import Workspace
from athanor.train import shared
from athanor.train.build import build_trainer
from athanor.train.memory import predict_peak
from athanor.train.shared import SharedBase
from support.models import ROWS


def test_the_memory_of_a_training_is_predicted_once_for_each_shape(
    tiny: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four trials: two numbers of layers by two learning rates, which need no memory."""
    base, _ = load_with_tokenizer(tiny)
    predictions: list[int] = []

    def record(*arguments: Any, **options: Any) -> int:
        predictions.append(predict_peak(*arguments, **options))
        return predictions[-1]

    monkeypatch.setattr(shared, "predict_peak", record)
    monkeypatch.chdir(repo)
    cfg = compose_config(Path("conf"), ["train.batch_size=2"])
    shared_base = SharedBase()
    peaks: list[int] = []
    for cfg.train.learning_rate in (1e-4, 1e-3):
        for cfg.train.num_layers in (1, 6):
            model = copy_sharing_weights(base)
            make_trainable(model, cfg.train, cfg.seed)
            trainer = build_trainer(cfg, Workspace.here(), model, ROWS, ROWS)
            peaks.append(shared_base.predict_peak(cfg, trainer, ROWS))
    assert len(predictions) == 2
    assert predictions[0] < predictions[1]
    assert peaks == predictions * 2
