"""Adapters that a model cannot have: refused by name before a training."""

import pytest

from athanor.config.rules import training_misfits
from athanor.config.schema import TrainConfig
from athanor.model.adapters import make_trainable
from support.models import ARCHITECTURES, COMMON, build_model
from support.refused import refused

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
DORA = TrainConfig(method="dora", num_layers=2, rank=4, scale=2.0, dropout=0.0)


@pytest.mark.parametrize("name", MIXTURES)
def test_dora_of_experts_is_refused(name: str) -> None:
    config = COMMON | ARCHITECTURES[name] | {"model_type": name}
    for described in (config, {"text_config": config}):
        [problem] = training_misfits(described, DORA)
        assert (problem.code, problem.facts) == ("config.dora_of_experts", {"experts": 4})
    with refused("model.no_adapters", method="dora"):  # where config.json does not tell
        make_trainable(build_model(name), DORA, 0)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in MIXTURES])
def test_no_other_model_is_a_mixture(name: str) -> None:
    config = COMMON | ARCHITECTURES[name] | {"model_type": name, "num_local_experts": 0}
    assert not list(training_misfits(config, DORA))
