"""Batches through a model: the loss at supervised positions, and its gradient by given weights.

Nothing here knows of a training: weights come in, a loss and a gradient go out, and rates,
optimizers and sums belong to whoever asks. So trainings can share all of it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from athanor.compute import losses
from athanor.compute.arrays import SupervisedBatch, TokenizedText, pad_rows
from athanor.compute.frozen import FrozenLayers
from athanor.compute.parts import Parts

Weights = dict[str, mx.array]  # by the names of a model's parameters

# With mx.compile shapes are rounded up to multiples of this, as mlx-lm does: each is compiled once.
ROUNDED = 32
# mlx-lm's names of what its adapter layers learn.
ADAPTERS = {"lora_a", "lora_b", "m"}


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as arrays; and what the frozen layers made of it, rows × positions × width."""

    batch: SupervisedBatch
    activations: mx.array | None


class Forward:
    """A model whose trainable weights are given with each batch.

    Half precision stays what the model computes in: its own weights, kept in float32 while they are
    trained, are rounded on their way in, and their gradients are float32. Adapters stay in float32,
    as mlx-lm's layers want them.

    Args:
        frozen: the layers below `cut`, shared by whoever has the same base; None for a model
            that is computed from its first layer on, every time.
        grad_checkpoint: whether layers keep their inputs only and compute the rest again.
        compile: whether to run it through mx.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        frozen: FrozenLayers | None = None,
        cut: int = 0,
        *,
        grad_checkpoint: bool = False,
        compile: bool = False,
    ) -> None:
        self.model, self.parts, self.frozen = model, parts.on(model), frozen
        self.grad_checkpoint, self.compile = grad_checkpoint, compile
        self.cut = cut if frozen is not None else 0
        self.dtype = compute_dtype(model)
        self._places = {name: self._place(name) for name in trainable_weights(model)}
        self._names = list(self._places)
        # Of the trained weights those that the head may hang on.
        self._beside = [i for i, name in enumerate(self._names) if not self.parts.in_layers(name)]
        self._graph = self._in_one_graph
        if compile:
            # What dropouts draw from is in the model's state.
            self._graph = mx.compile(self._graph, inputs=[model.state], outputs=[model.state])

    @classmethod
    def from_model(cls, model: nn.Module, rows: list[TokenizedText]) -> "Forward":
        """A model by itself, taken apart on the first tokens of some rows."""
        return cls(model, Parts.find(model, probe_tokens(rows)))

    def prepare(self, rows: list[TokenizedText]) -> PreparedBatch:
        """Makes all of a batch that does not hang on weights."""
        batch = pad_rows(rows, ROUNDED if self.compile else 1)
        given = None
        if self.cut and self.frozen is not None:
            given = self.frozen.activations(rows, self.cut, batch.inputs.shape[1])
        return PreparedBatch(batch, given)

    def set_weights(self, weights: Weights) -> None:
        """Makes these the model's weights, in what it computes in."""
        for name, weight in weights.items():
            holder, key, dtype = self._places[name]
            holder[key] = weight if dtype is None else weight.astype(dtype)

    def loss_and_gradient(self, weights: Weights, ready: PreparedBatch) -> tuple[mx.array, Weights]:
        """The summed loss of a batch in nats, and its gradient by the weights, yet to be evaluated.

        The model's own weights are these afterwards.
        """
        values = [weights[name] for name in self._names]
        kinds = {type(layer) for layer in self.model.layers[self.cut :]}
        with ExitStack() as stack:
            for kind in kinds if self.grad_checkpoint else ():
                stack.enter_context(recomputing(kind))
            if losses.in_numpy() and self.dtype == mx.float32 and not self.compile:
                loss, gradients = self._in_two(values, ready)
            else:
                given = [] if ready.activations is None else [ready.activations]
                loss, gradients = self._graph(values, list(ready.batch), given)
        self.set_weights(weights)
        return loss, dict(zip(self._names, gradients, strict=True))

    def token_losses(self, ready: PreparedBatch) -> np.ndarray:
        """The cross-entropy in nats of each supervised token, by the model's own weights."""
        batch = ready.batch
        hidden = self._hidden(batch, ready.activations)
        return losses.token_losses(self.parts.head, hidden, batch, self.parts.vocabulary)

    def _place(self, name: str) -> tuple[Any, int | str, mx.Dtype | None]:
        """What has a weight, its name there, and what it is rounded to, if it is."""
        *path, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        holder: Any = self.model
        for key in path:
            holder = holder[key]
        keeps = getattr(self.model, "cast_predicate", None)  # mlx-lm: what must stay as it is
        own = last not in ADAPTERS and (keeps is None or keeps(name))
        return holder, last, self.dtype if own else None

    def _hidden(self, batch: SupervisedBatch, given: mx.array | None) -> mx.array:
        """What the head is given at the supervised positions, n × width."""
        body = self.parts.body(batch.inputs, self.cut, given)
        return body.reshape(-1, body.shape[-1])[batch.positions]

    def _head(self, hidden: mx.array, *beside: mx.array) -> mx.array:
        if beside:
            names = [self._names[place] for place in self._beside]
            self.set_weights(dict(zip(names, beside, strict=True)))
        return self.parts.head(hidden)

    def _in_two(
        self, values: list[mx.array], ready: PreparedBatch
    ) -> tuple[mx.array, list[mx.array]]:
        """Through the body, through the head, and back: the head ends before the way back begins.

        The graph of the way back is made together with the way there, as all of mlx's are, so that
        what it needs is kept and nothing else. It begins with an array that is filled in between.
        """
        batch = ready.batch

        def through(*values: mx.array) -> mx.array:
            self.set_weights(dict(zip(self._names, values, strict=True)))
            return self._hidden(batch, ready.activations)

        back = mx.zeros((len(batch.targets), self.parts.width), self.dtype)
        mx.eval(back)
        (hidden,), gradients = mx.vjp(through, values, [back])
        mx.eval(hidden)
        beside = [values[place] for place in self._beside]
        loss, by_hidden, by_beside = losses.loss_and_gradients(
            self._head, hidden, beside, batch, self.parts.vocabulary
        )
        np.array(back, copy=False)[...] = np.array(by_hidden, copy=False)
        for place, gradient in zip(self._beside, by_beside, strict=True):
            gradients[place] = gradients[place] + gradient
        return loss, gradients

    def _in_one_graph(
        self, values: list[mx.array], arrays: list[mx.array], given: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """The same as one graph, as mx.compile wants it."""
        batch = SupervisedBatch(*arrays)

        def loss(values: list[mx.array]) -> mx.array:
            self.set_weights(dict(zip(self._names, values, strict=True)))
            hidden = self._hidden(batch, given[0] if given else None)
            beside = [values[place] for place in self._beside]
            return losses.differentiable_loss(
                self._head, hidden, beside, batch, self.parts.vocabulary
            )

        found: tuple[mx.array, list[mx.array]] = mx.value_and_grad(loss)(values)
        return found


def probe_tokens(rows: list[TokenizedText]) -> mx.array:
    """A few tokens to try a model's parts on: 2 × 8 from the beginnings of rows."""
    found = [token for row in rows[:16] for token in row.ids[:16]] or [0]
    return mx.array([found[place % len(found)] for place in range(16)]).reshape(2, 8)


def trainable_weights(model: nn.Module) -> Weights:
    """What is trained of a model."""
    return cast(Weights, tree_flatten(model.trainable_parameters(), destination={}))


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """What a model computes in: that of its frozen weights, or of all where none is frozen."""
    trained = trainable_weights(model)
    found = Counter(
        value.dtype
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating) and name not in trained
    )
    return found.most_common(1)[0][0] if found else mx.float32


@contextmanager
def recomputing(kind: type[nn.Module]) -> Iterator[None]:
    """While the block runs, layers of this kind keep their inputs only and compute the rest again.

    That is mlx_lm.tuner.trainer's grad_checkpoint, which patches the class for good.
    """
    call = kind.__call__

    def compute(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        def inner(parameters: Any, *inputs: Any, **named: Any) -> Any:
            module.update(parameters)
            return call(module, *inputs, **named)

        return mx.checkpoint(inner)(module.trainable_parameters(), *inputs, **named)

    kind.__call__ = compute
    try:
        yield
    finally:
        kind.__call__ = call
