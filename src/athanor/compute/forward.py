"""The loss of a model at supervised positions, and its gradient by weights that are passed in.

A function of weights and a batch. Learning rates, optimizers and sums of gradients belong to the
caller, so that several trainings can share one Forward.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from athanor.compute import losses
from athanor.compute.arrays import SupervisedBatch, TokenizedText, pad_rows
from athanor.compute.frozen import FrozenLayers
from athanor.compute.parts import Parts
from athanor.device.backend import on_cpu

Weights = dict[str, mx.array]  # by the names of a model's parameters

# With mx.compile shapes are rounded up to multiples of this, as mlx-lm does: each is compiled once.
ROUNDED = 32
# mlx-lm's names of the trained weights of its adapter layers.
ADAPTERS = {"lora_a", "lora_b", "m"}


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as arrays, with the activations that its frozen layers give, if there are any."""

    batch: SupervisedBatch
    activations: mx.array | None  # [rows, positions, width], the inputs of the layer at the cut


class Forward:
    """A model as a function of its trainable weights and a batch.

    A model in half precision computes in half precision: its own weights, which are float32 while
    they are trained, are rounded when they are set, and their gradients are float32. Adapters stay
    float32, as in mlx-lm's layers.

    Args:
        frozen: the cached layers below `cut`, shared by trainings of the same base; None to compute
            the model from its first layer on every time.
        grad_checkpoint: whether layers keep only their inputs and recompute the rest for gradients.
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
        self.model, self.frozen = model, frozen
        self.parts = replace(parts, model=model)
        self.grad_checkpoint, self.compile = grad_checkpoint, compile
        self.cut = cut if frozen is not None else 0
        self.dtype = compute_dtype(model)
        self._places = {name: self._place(name) for name in trainable_weights(model)}
        self._names = list(self._places)
        # Places in _names of the trained weights that the head may depend on.
        self._head_places = [
            i for i, name in enumerate(self._names) if not self.parts.in_layers(name)
        ]
        self._graph = self._in_one_graph
        if compile:
            # The model's state has the keys of dropouts.
            self._graph = mx.compile(self._graph, inputs=[model.state], outputs=[model.state])

    @classmethod
    def from_model(cls, model: nn.Module, rows: list[TokenizedText]) -> "Forward":
        """Return a model without a cache, split on the first tokens of some rows."""
        return cls(model, Parts.find(model, probe_tokens(rows)))

    def prepare(self, rows: list[TokenizedText]) -> PreparedBatch:
        """Prepare all of a batch that does not depend on the trained weights."""
        batch = pad_rows(rows, ROUNDED if self.compile else 1)
        activations = None
        if self.cut and self.frozen is not None:
            activations = self.frozen.activations(rows, self.cut, batch.inputs.shape[1])
        return PreparedBatch(batch, activations)

    def set_weights(self, weights: Weights) -> None:
        """Set the model's trainable weights, in the dtype that it computes in."""
        for name, weight in weights.items():
            holder, key, dtype = self._places[name]
            holder[key] = weight if dtype is None else weight.astype(dtype)

    def loss_and_gradient(
        self, weights: Weights, prepared: PreparedBatch
    ) -> tuple[mx.array, Weights]:
        """Return the summed loss of a batch in nats, and its gradient by the weights, unevaluated.

        Sets the model's weights.
        """
        values = [weights[name] for name in self._names]
        kinds = {type(layer) for layer in self.model.layers[self.cut :]}
        with ExitStack() as stack:
            for kind in kinds if self.grad_checkpoint else ():
                stack.enter_context(gradient_checkpointing(kind))
            if on_cpu() and self.dtype == mx.float32 and not self.compile:
                loss, gradients = self._in_two_steps(values, prepared)
            else:
                activations = [] if prepared.activations is None else [prepared.activations]
                loss, gradients = self._graph(values, list(prepared.batch), activations)
        self.set_weights(weights)
        return loss, dict(zip(self._names, gradients, strict=True))

    def token_losses(self, prepared: PreparedBatch) -> np.ndarray:
        """Return the cross-entropy in nats of each supervised token, by the model's own weights."""
        return losses.token_losses(
            self.parts.head, self.hidden(prepared), prepared.batch, self.parts.vocabulary
        )

    def hidden(self, prepared: PreparedBatch) -> mx.array:
        """Return the inputs [n, width] of the head at the n supervised positions."""
        batch = prepared.batch
        body = self.parts.body(batch.inputs, self.cut, prepared.activations)
        return body.reshape(-1, body.shape[-1])[batch.positions]

    def _place(self, name: str) -> tuple[Any, int | str, mx.Dtype | None]:
        """Return the holder of a weight, its name there, and the dtype to cast it to, if any."""
        *path, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        holder: Any = self.model
        for key in path:
            holder = holder[key]
        keeps = getattr(self.model, "cast_predicate", None)  # mlx-lm: what must stay as it is
        own = last not in ADAPTERS and (keeps is None or keeps(name))
        return holder, last, self.dtype if own else None

    def _head(self, hidden: mx.array, *weights: mx.array) -> mx.array:
        if weights:
            names = [self._names[place] for place in self._head_places]
            self.set_weights(dict(zip(names, weights, strict=True)))
        return self.parts.head(hidden)

    def _in_two_steps(
        self, values: list[mx.array], prepared: PreparedBatch
    ) -> tuple[mx.array, list[mx.array]]:
        """Compute the loss and the gradients; the head's logits are freed before the body's vjp.

        mlx builds the graph of the vjp with that of the body, so that only what it needs is kept.
        The gradient by the head's input is not known then: it is an array that is filled later.
        """
        batch = prepared.batch

        def body(*values: mx.array) -> mx.array:
            self.set_weights(dict(zip(self._names, values, strict=True)))
            return self.hidden(prepared)

        cotangent = mx.zeros((len(batch.targets), self.parts.width), self.dtype)
        mx.eval(cotangent)
        (hidden,), gradients = mx.vjp(body, values, [cotangent])
        mx.eval(hidden)
        head_weights = [values[place] for place in self._head_places]
        loss, by_hidden, by_head = losses.loss_and_gradients(
            self._head, hidden, head_weights, batch, self.parts.vocabulary
        )
        np.array(cotangent, copy=False)[...] = np.array(by_hidden, copy=False)
        for place, gradient in zip(self._head_places, by_head, strict=True):
            gradients[place] = gradients[place] + gradient
        return loss, gradients

    def _in_one_graph(
        self, values: list[mx.array], batch: list[mx.array], activations: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """Compute the same as one graph, as mx.compile needs it."""
        arrays = SupervisedBatch(*batch)
        prepared = PreparedBatch(arrays, activations[0] if activations else None)

        def loss(values: list[mx.array]) -> mx.array:
            self.set_weights(dict(zip(self._names, values, strict=True)))
            return losses.differentiable_loss(
                self._head,
                self.hidden(prepared),
                [values[place] for place in self._head_places],
                arrays,
                self.parts.vocabulary,
            )

        result: tuple[mx.array, list[mx.array]] = mx.value_and_grad(loss)(values)
        return result


def probe_tokens(rows: list[TokenizedText]) -> mx.array:
    """Return tokens [2, 8] from the beginnings of rows, to try a model's parts on."""
    ids = [token for row in rows[:16] for token in row.ids[:16]] or [0]
    return mx.array([ids[place % len(ids)] for place in range(16)]).reshape(2, 8)


def trainable_weights(model: nn.Module) -> Weights:
    """Return the trainable weights of a model, by name."""
    return cast(Weights, tree_flatten(model.trainable_parameters(), destination={}))


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype that a model computes in: the most common one of its frozen weights."""
    trained = trainable_weights(model)
    dtypes = Counter(
        value.dtype
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating) and name not in trained
    )
    return dtypes.most_common(1)[0][0] if dtypes else mx.float32


@contextmanager
def gradient_checkpointing(kind: type[nn.Module]) -> Iterator[None]:
    """Make layers of a class keep only their inputs and recompute the rest, while the block runs.

    The same as mlx_lm.tuner.trainer's grad_checkpoint, which patches the class for good.
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
