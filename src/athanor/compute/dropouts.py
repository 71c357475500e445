"""Dropout whose masks come from explicit keys instead of the state of a generator."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class KeyedDropout(nn.Module):
    """mlx.nn.Dropout with the same mask each time until it gets another key.

    Gradient checkpointing computes a layer twice, and must meet the same mask.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self._keep = keep
        self._key = mx.random.key(0)

    def set_key(self, key: mx.array) -> None:
        """Set the key of the next masks."""
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        return mx.random.bernoulli(self._keep, x.shape, key=self._key) * x * (1 / self._keep)


def is_dropout(module: nn.Module) -> bool:
    """Return whether a module is a dropout with a probability above 0."""
    plain = isinstance(module, nn.Dropout) and module._p_1 < 1
    return plain or isinstance(module, KeyedDropout)


def replace_dropouts(model: nn.Module) -> list[KeyedDropout]:
    """Replace each active nn.Dropout of a model by a KeyedDropout; return these."""
    keyed = {
        name: KeyedDropout(module._p_1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and is_dropout(module)
    }
    if keyed:
        model.update_modules(tree_unflatten(list(keyed.items())))
    return list(keyed.values())
