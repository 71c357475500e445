"""Dropout by keys: what is dropped comes from a key that is given, not from a generator's state."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class KeyedDropout(nn.Module):
    """Dropout that draws from a key it is given, as mlx.nn.Dropout does from the global state.

    Whoever computes a layer again, as gradient checkpointing does, meets the same mask.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self._keep = keep
        self._key = mx.random.key(0)

    def set_key(self, key: mx.array) -> None:
        """Sets the key of the next masks."""
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        return mx.random.bernoulli(self._keep, x.shape, key=self._key) * x * (1 / self._keep)


def drops(module: nn.Module) -> bool:
    """Whether a module drops anything out, by itself."""
    plain = isinstance(module, nn.Dropout) and module._p_1 < 1
    return plain or isinstance(module, KeyedDropout)


def replace_dropouts(model: nn.Module) -> list[KeyedDropout]:
    """Puts a KeyedDropout in the place of each nn.Dropout that drops anything; returns them."""
    found = {
        name: KeyedDropout(module._p_1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and drops(module)
    }
    if found:
        model.update_modules(tree_unflatten(list(found.items())))
    return list(found.values())
