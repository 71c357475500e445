"""An mlx-lm model split into the layers below a cut, those above it, and the head.

No architecture is known by name. A part is the model's own code with stand-ins for the other parts:
the head is the whole model with a body that returns its input; the layers above a cut are the body
with layers below it that do so. So scales, soft caps, masks and tied weights stay where the model's
author put them. Each split is compared with the whole model on a few tokens; a model for which the
results differ is not split, and the reason is kept.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from athanor.compute.dropouts import is_dropout

# By how much two computations of the same values may differ, as a share of the largest value at a
# position: of arrays of the same shape, and of different shapes, whose sums have another order
# (float32 products on a GPU may be TF32).
SAME_SHAPE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 1e-3}
OTHER_SHAPE = {mx.float32: 2e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}


class _StandIn:
    """A module's substitute with another forward function, and its other attributes."""

    def __init__(self, module: Any, call: Callable[..., mx.array]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array:
        return self._call(x, *others, **named)


def _identity(x: mx.array, *others: Any, **named: Any) -> mx.array:
    return x


def _stand_in_for(layers: list[Any], output: mx.array) -> list[_StandIn]:
    """Return stand-ins for the first layers of a model, of which the last returns `output`."""
    identities = [_StandIn(layer, _identity) for layer in layers[:-1]]
    return [*identities, _StandIn(layers[-1], lambda *others, **named: output)]


class Misfit(Exception):
    """The reason for which a model can't be split."""


@dataclass(frozen=True)
class Parts:
    """A model and the places of its parts.

    Args:
        probe: tokens [rows, positions] on which splits are compared with the whole model.
        probe_hidden: the output [rows, positions, width] of the body for these.
        width: the size of the body's output; of logits where the head can't be split off.
        path: the names that lead from the model to its body.
        layers_name: the attribute of the body that is the list of layers.
        unsplit_reason: why the head can't be split off, if so: the body is then the model itself.
        uncut_reasons: for each cut that was tried, why the layers can't be split there, or None.
    """

    model: nn.Module
    probe: mx.array
    probe_hidden: mx.array
    vocabulary: int
    width: int
    path: tuple[str, ...]
    layers_name: str
    unsplit_reason: str | None = None
    uncut_reasons: dict[int, str | None] = field(default_factory=dict)

    @classmethod
    def find(cls, model: nn.Module, ids: mx.array) -> "Parts":
        """Find the parts of a model, and try its head on tokens [rows, positions]."""
        with eval_mode(model):
            expected = model(ids)
            size = expected.shape[-1]
            parts = cls(model, ids, expected, size, size, (), "")
            try:
                path, layers_name = _find_layers(model)
                parts = replace(parts, path=path, layers_name=layers_name)
                hidden = parts._try_head(expected)
                return replace(parts, probe_hidden=hidden, width=hidden.shape[-1])
            except Exception as error:  # the model's code, called in a way it was not written for
                return replace(parts, unsplit_reason=_describe(error))

    def in_layers(self, name: str) -> bool:
        """Return whether a parameter of this name belongs to a layer."""
        prefix = ".".join([*self.path, self.layers_name, ""])
        return bool(self.layers_name) and name.startswith(prefix)

    def first_layer(self, names: Iterable[str]) -> int:
        """Return the number of the first layer that has one of these parameters.

        0 where one of them belongs to no layer: it may be the embedding's.
        """
        names = list(names)
        if not all(map(self.in_layers, names)):
            return 0
        place = len(self.path) + 1
        return min((int(name.split(".")[place]) for name in names), default=0)

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits [n, vocabulary] of the body's output [n, width]."""
        if self.unsplit_reason is not None:
            return hidden
        body = _StandIn(self._body(), _identity)
        logits: mx.array = self._with_body(body)(hidden[None])
        return logits[0]

    def body(self, ids: mx.array, cut: int = 0, activations: mx.array | None = None) -> mx.array:
        """Return the input [rows, positions, width] of the head for tokens [rows, positions].

        With `activations`, the inputs of the layer `cut`, the layers below it are not computed.
        """
        if activations is None:
            return cast(mx.array, self._body()(ids, None))
        layers = self._layers()
        layers[:cut] = _stand_in_for(layers[:cut], activations)
        return cast(mx.array, self._with_layers(layers)(ids, None))

    def layer_inputs(
        self, ids: mx.array, cuts: Sequence[int], start: int = 0, below: mx.array | None = None
    ) -> dict[int, mx.array]:
        """Return the inputs [rows, positions, width] of the layers `cuts` for tokens.

        Layers from `start` on are computed, on its inputs `below`; none from the last cut on.
        """
        inputs: dict[int, mx.array] = {}
        last = max(cuts)

        def recording(place: int, layer: Any) -> _StandIn:
            def call(x: mx.array, *others: Any, **named: Any) -> mx.array:
                inputs[place] = x
                output: mx.array = x if place == last else layer(x, *others, **named)
                return output

            return _StandIn(layer, call)

        layers = self._layers()
        if below is not None:
            layers[:start] = _stand_in_for(layers[:start], below)
        for place in cuts:
            layers[place] = recording(place, layers[place])
        layers[last + 1 :] = [_StandIn(layer, _identity) for layer in layers[last + 1 :]]
        self._with_layers(layers)(ids, None)  # only a graph, of which the inputs are evaluated
        if set(inputs) != set(cuts):
            raise Misfit("it does not compute the layers that it lists")
        return inputs

    def can_cut_at(self, cut: int) -> bool:
        """Return whether the layers can be split before `cut`; `uncut_reasons` has the reason."""
        if cut not in self.uncut_reasons:
            self.uncut_reasons[cut] = None
            try:
                with eval_mode(self.model):
                    self._try_cut(cut)
            except Exception as error:  # as above
                self.uncut_reasons[cut] = _describe(error)
        return self.uncut_reasons[cut] is None

    def _try_head(self, expected: mx.array) -> mx.array:
        """Return the body's output for the probe, if the head turns it into `expected`."""
        hidden = self.body(self.probe)
        if hidden.ndim != 3 or hidden.shape[-1] == expected.shape[-1]:
            raise Misfit("it has no separate head")
        rows, positions, width = hidden.shape
        # As one row: that reveals a head that looks at other positions than its own.
        logits = self.head(hidden.reshape(-1, width)).reshape(rows, positions, -1)
        refuse_difference(logits, expected, OTHER_SHAPE, "head(body(x)) differs from model(x)")
        return hidden

    def _try_cut(self, cut: int) -> None:
        ids = self.probe
        above = {id(module) for layer in self._layers()[cut:] for module in layer.modules()}
        if any(is_dropout(module) for module in self.model.modules() if id(module) not in above):
            raise Misfit("there is dropout below the cut")
        inputs = self.layer_inputs(ids, [cut])[cut]
        # Other tokens in between: a layer with a memory must not be compared with its own past.
        mx.eval(inputs, self.model(ids[::-1, ::-1]))
        hidden = self.body(ids, cut, inputs)
        refuse_difference(
            hidden,
            self.probe_hidden,
            SAME_SHAPE,
            "the layers above need more than the cut's inputs",
        )
        short = max(ids.shape[1] // 2, 1)
        alone = self.layer_inputs(ids[:1, :short], [cut])[cut]
        refuse_difference(
            alone, inputs[:1, :short], OTHER_SHAPE, "a row depends on the others of its batch"
        )

    def _body(self) -> Any:
        return self.model if self.unsplit_reason is not None else self._holder()

    def _holder(self) -> Any:
        """Return the module that has the layers."""
        module: Any = self.model
        for name in self.path:
            module = module[name]
        return module

    def _layers(self) -> list[Any]:
        return list(self._holder()[self.layers_name])

    def _with_body(self, body: Any) -> Any:
        """Return the model with another body; everything else is shared."""
        modules: list[Any] = [self.model]
        for name in self.path[:-1]:
            modules.append(modules[-1][name])
        for module, name in zip(reversed(modules), reversed(self.path), strict=True):
            body = _with_attribute(module, name, body)
        return body

    def _with_layers(self, layers: list[Any]) -> Any:
        """Return the body with other layers; everything else is shared."""
        body = _with_attribute(self._holder(), self.layers_name, layers)
        return body if self.unsplit_reason is None else self._with_body(body)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation while the block runs: some compute differently in training."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _find_layers(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """Return the path to the module that holds the layers, and their name there."""
    first = model.layers[0]
    for path, module in model.named_modules():
        for name, value in module.items():
            if isinstance(value, list) and any(layer is first for layer in value):
                if len(value) != len(model.layers):
                    raise Misfit("its layers are in more than one list")
                return tuple(path.split(".")) if path else (), name
    raise Misfit("its layers are not in a list")


def _with_attribute(module: Any, name: str, value: Any) -> Any:
    """Return a copy of a module that shares all but one attribute."""
    copied = copy.copy(module)
    dict.__setitem__(copied, name, value)
    return copied


def refuse_difference(
    actual: mx.array, expected: mx.array, limits: dict[mx.Dtype, float], reason: str
) -> None:
    """Raise Misfit where two results differ by more than the limit of their dtype."""
    if actual.shape != expected.shape:
        raise Misfit(f"{reason}: {actual.shape}, {expected.shape}")
    a, b = actual.astype(mx.float32), expected.astype(mx.float32)
    limit = limits.get(expected.dtype, limits[mx.float32])
    # Masked logits are -inf on both sides. The limit is a share of the largest value at the same
    # position: those of the first position are often a thousand times as large as elsewhere.
    difference = mx.where(a == b, 0.0, mx.abs(a - b)).max(axis=-1)
    size = mx.where(mx.isinf(b), 0.0, mx.abs(b)).max(axis=-1)
    if not mx.all(difference <= limit * size).item():
        ratio = mx.where(difference == difference, difference / (size + 1e-30), mx.inf)
        worst = int(mx.argmax(ratio))
        off, of = (float(array.reshape(-1)[worst]) for array in (difference, size))
        raise Misfit(f"{reason} ({off:.2g} of {of:.2g})")


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, Misfit) else f"{type(error).__name__}: {error}"
