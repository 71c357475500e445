"""Results that trainings on one base and the same rows share."""

from dataclasses import dataclass, field

from athanor.compute.arrays import TokenizedText
from athanor.compute.frozen import FrozenLayers
from athanor.config.schema import Config
from athanor.config.values import effective_values
from athanor.train import checkpoints
from athanor.train.memory import predict_peak
from athanor.train.trainer import Trainer

# Keys that sweeps vary and that the memory of a training does not depend on.
MEMORY_INDEPENDENT = {
    "seed",
    "train.learning_rate",
    "train.lr_schedule",
    "train.lr_end",
    "train.warmup",
    "train.max_grad_norm",
    "train.iters",
    "train.epochs",
    "train.patience",
}


@dataclass(frozen=True)
class SharedBase:
    """Results that trainings on one base share: activations of frozen layers, and peaks of memory.

    `frozen` is None where each training computes its own; `peaks` are in bytes, by the digest of
    the values that they depend on.
    """

    frozen: FrozenLayers | None = None
    peaks: dict[str, int] = field(default_factory=dict)

    def predict_peak(self, cfg: Config, trainer: Trainer, rows: list[TokenizedText]) -> int:
        """Return the peak memory of a training in bytes, predicted once for each shape."""
        shape = checkpoints.key(
            {k: v for k, v in effective_values(cfg).items() if k not in MEMORY_INDEPENDENT}
        )
        if shape not in self.peaks:
            self.peaks[shape] = predict_peak(
                trainer.forward,
                trainer.learner,
                max(rows, key=len),
                min(cfg.train.batch_size, len(rows)),
                accumulates=cfg.train.grad_accumulation_steps > 1,
            )
        return self.peaks[shape]
