"""An mlx-lm model taken apart: layers below a cut, layers above it, and the head behind them.

No architecture is known by name. A part is the model's own code with stand-ins for what is left
out: the head is the whole model whose body hands on what it is given; the layers above a cut are
the body whose layers below it do so. So scales, soft caps, masks and tied weights are where the
model's author put them. Whether that gives what the whole model gives is tried on a few tokens
(`Parts.of`); where it does not, the model is not taken apart, and why is said.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from athanor.compute.dropouts import drops

# How far two computations of the same may be apart, of the largest value at a position: in one and
# the same shape, and in others, summed in another order (float32 products on a GPU may be TF32).
SAME_SHAPE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 1e-3}
OTHER_SHAPE = {mx.float32: 2e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}


class _StandIn:
    """Stands for a module: answers a call with `call`, and everything else as the module does."""

    def __init__(self, module: Any, call: Callable[..., mx.array]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array:
        return self._call(x, *others, **named)


def _handed_on(x: mx.array, *others: Any, **named: Any) -> mx.array:
    return x


def _standing_in(layers: list[Any], given: mx.array) -> list[_StandIn]:
    """Stand-ins for the first layers of a model, of which the last gives what is given."""
    handing = [_StandIn(layer, _handed_on) for layer in layers[:-1]]
    return [*handing, _StandIn(layers[-1], lambda *others, **named: given)]


class Misfit(Exception):
    """Why a model can't be taken apart, in words."""


@dataclass(frozen=True)
class Parts:
    """A model and where its parts are; `width` is that of what its body leaves.

    `tried_on` are tokens, rows × positions, on which it is tried whether it can be taken apart, and
    `left` is what the body leaves of them.
    `path` are the names that lead from the model to its body, whose attribute `key` is the list of
    its layers. `unsplit_reason` says why the head is not apart: the body is then the model itself.
    `uncut_reasons` says why its layers can't be parted at a cut, for each that was tried.
    """

    model: nn.Module
    tried_on: mx.array
    left: mx.array
    vocabulary: int
    width: int
    path: tuple[str, ...]
    key: str
    unsplit_reason: str | None = None
    uncut_reasons: dict[int, str | None] = field(default_factory=dict)

    @classmethod
    def find(cls, model: nn.Module, ids: mx.array) -> "Parts":
        """Finds the parts of a model, and tries its head on tokens, rows × positions."""
        with eval_mode(model):
            return cls._find(model, ids)

    @classmethod
    def _find(cls, model: nn.Module, ids: mx.array) -> "Parts":
        expected = model(ids)
        size = expected.shape[-1]
        found = cls(model, ids, expected, size, size, (), "")
        try:
            path, key = _place_of_layers(model)
            found = replace(found, path=path, key=key)
            hidden = found._try_head(expected)
            return replace(found, left=hidden, width=hidden.shape[-1])
        except Exception as error:  # a model's own code, called in a way it was not written for
            return replace(found, unsplit_reason=_in_words(error))

    def on(self, model: nn.Module) -> "Parts":
        """The same parts of another model of this architecture."""
        return replace(self, model=model)

    def in_layers(self, name: str) -> bool:
        """Whether a parameter of this name is one of the layers'."""
        return bool(self.key) and name.startswith(".".join([*self.path, self.key, ""]))

    def first_layer(self, names: Iterable[str]) -> int:
        """The number of the first layer that has one of these parameters: so many are below it.

        0 where one of them is beside the layers: it may be the embedding's.
        """
        names = list(names)
        if not all(map(self.in_layers, names)):
            return 0
        place = len(self.path) + 1
        return min((int(name.split(".")[place]) for name in names), default=0)

    def head(self, hidden: mx.array) -> mx.array:
        """The logits, n × vocabulary, of what the body left at n positions, n × width."""
        if self.unsplit_reason is not None:
            return hidden
        body = _StandIn(self._found_body(), _handed_on)
        logits: mx.array = self._with_body(body)(hidden[None])
        return logits[0]

    def body(self, ids: mx.array, cut: int = 0, given: mx.array | None = None) -> mx.array:
        """What the head is given, rows × positions × width, for tokens, rows × positions.

        With a cut the layers from there on are computed only, on `given`, their input.
        """
        if given is None:
            return cast(mx.array, self._found_body()(ids, None))
        layers = self._layers()
        layers[:cut] = _standing_in(layers[:cut], given)
        return cast(mx.array, self._with_layers(layers)(ids, None))

    def lower(
        self, ids: mx.array, cuts: Sequence[int], start: int = 0, given: mx.array | None = None
    ) -> dict[int, mx.array]:
        """The inputs of the layers `cuts`, each rows × positions × width, for tokens.

        Layers from `start` on are computed, on `given`, their input; none from the last cut on.
        """
        noted: dict[int, mx.array] = {}
        last = max(cuts)

        def noting(place: int, layer: Any) -> _StandIn:
            def call(x: mx.array, *others: Any, **named: Any) -> mx.array:
                noted[place] = x
                answer: mx.array = x if place == last else layer(x, *others, **named)
                return answer

            return _StandIn(layer, call)

        layers = self._layers()
        if given is not None:
            layers[:start] = _standing_in(layers[:start], given)
        for place in cuts:
            layers[place] = noting(place, layers[place])
        layers[last + 1 :] = [_StandIn(layer, _handed_on) for layer in layers[last + 1 :]]
        self._with_layers(layers)(ids, None)  # a graph only, of which what was noted is computed
        if set(noted) != set(cuts):
            raise Misfit("its layers are not the ones that it computes")
        return noted

    def can_cut_at(self, cut: int) -> bool:
        """Return whether the layers can be split before `cut`; `uncut_reasons` has the reason."""
        if cut not in self.uncut_reasons:
            self.uncut_reasons[cut] = None
            try:
                with eval_mode(self.model):
                    self._try_cut(cut)
            except Exception as error:  # as above
                self.uncut_reasons[cut] = _in_words(error)
        return self.uncut_reasons[cut] is None

    def _try_head(self, expected: mx.array) -> mx.array:
        """What the body leaves, if the head makes of that what the model does."""
        hidden = self.body(self.tried_on)
        if hidden.ndim != 3 or hidden.shape[-1] == expected.shape[-1]:
            raise Misfit("its head is not apart from its body")
        rows, positions, width = hidden.shape
        # All rows as one: a head that looks at other positions than its own is found out, too.
        logits = self.head(hidden.reshape(-1, width)).reshape(rows, positions, -1)
        _refuse_other(logits, expected, OTHER_SHAPE, "head(body(x)) is not model(x)")
        return hidden

    def _try_cut(self, cut: int) -> None:
        ids = self.tried_on
        above = {id(module) for layer in self._layers()[cut:] for module in layer.modules()}
        if any(drops(module) for module in self.model.modules() if id(module) not in above):
            raise Misfit("it drops out below the cut")
        given = self.lower(ids, [cut])[cut]
        # What a layer remembers of these tokens must not be what it is compared with.
        mx.eval(given, self.model(ids[::-1, ::-1]))
        out = self.body(ids, cut, given)
        _refuse_other(out, self.left, SAME_SHAPE, "the layers above the cut need more than it")
        short = max(ids.shape[1] // 2, 1)
        alone = self.lower(ids[:1, :short], [cut])[cut]
        _refuse_other(alone, given[:1, :short], OTHER_SHAPE, "a row depends on its company")

    def _found_body(self) -> Any:
        return self.model if self.unsplit_reason is not None else self._holder()

    def _holder(self) -> Any:
        """The module that has the layers."""
        found: Any = self.model
        for name in self.path:
            found = found[name]
        return found

    def _layers(self) -> list[Any]:
        return list(self._holder()[self.key])

    def _with_body(self, body: Any) -> Any:
        """The model with another body; everything else is shared."""
        modules: list[Any] = [self.model]
        for name in self.path[:-1]:
            modules.append(modules[-1][name])
        for module, name in zip(reversed(modules), reversed(self.path), strict=True):
            body = _over(module, name, body)
        return body

    def _with_layers(self, layers: list[Any]) -> Any:
        """The body with other layers; everything else is shared."""
        body = _over(self._holder(), self.key, layers)
        return body if self.unsplit_reason is None else self._with_body(body)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While the block runs the model is not in training: some compute otherwise then."""
    before = model.training
    if before:
        model.eval()
    try:
        yield
    finally:
        if before:
            model.train()


def _place_of_layers(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """The path to the module that holds the layers, and their name there."""
    first = model.layers[0]
    for name, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, list) and any(one is first for one in value):
                if len(value) != len(model.layers):
                    raise Misfit("not all of its layers are here")
                return tuple(name.split(".")) if name else (), key
    raise Misfit("its layers are not in a list")


def _over(module: Any, name: str, value: Any) -> Any:
    """A copy of a module that shares all but one attribute."""
    found = copy.copy(module)
    dict.__setitem__(found, name, value)
    return found


def _refuse_other(
    found: mx.array, expected: mx.array, limits: dict[mx.Dtype, float], why: str
) -> None:
    if found.shape != expected.shape:
        raise Misfit(f"{why}: {found.shape}, {expected.shape}")
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    limit = limits.get(expected.dtype, limits[mx.float32])
    # Masked logits are -inf on both sides. By position: what is at the first is often a thousand
    # times as large as elsewhere.
    apart = mx.where(a == b, 0.0, mx.abs(a - b)).max(axis=-1)
    size = mx.where(mx.isinf(b), 0.0, mx.abs(b)).max(axis=-1)
    if not mx.all(apart <= limit * size).item():
        worst = int(mx.argmax(mx.where(apart == apart, apart / (size + 1e-30), mx.inf)))
        by, of = (float(one.reshape(-1)[worst]) for one in (apart, size))
        raise Misfit(f"{why} ({by:.2g} of {of:.2g})")


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, Misfit) else f"{type(error).__name__}: {error}"
