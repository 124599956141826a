"""What recipes share: how a module of another code base is known, and how its class becomes one that calls kernels."""

from __future__ import annotations

import copy
import copyreg
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from attnext import _checks, functional
from attnext.attention.base import has_global_hooks, has_own_hooks
from attnext.backends import choose
from attnext.definitions import by_definition
from attnext.memory import Memory

__all__ = [
    "Draw",
    "Kept",
    "Layers",
    "Ready",
    "Recipe",
    "Sizes",
    "Trial",
    "attend",
    "by_name",
    "inert",
    "is_changed",
    "layer_at",
    "plain_weight",
    "ready",
    "step",
    "swapped",
    "visible",
]

T = TypeVar("T")
_KEPT = "_attnext"
"""The attribute with what a swapped module keeps between calls beside its own class's attributes."""

Sizes = Mapping[str, tuple[str | int, ...]]
Layers = Mapping[str, type[nn.Module]]
Draw = Callable[..., Tensor]
"""Makes a random float64 input of the sizes it is given, which is differentiated."""


class Trial(NamedTuple):
    """What the probe calls: inputs, and a function of a module and these, that gives all results as tensors.

    It is called with the original and with the swapped module, and must use each as its code base does, for some steps
    with what is kept between them.
    """

    inputs: Sequence[Tensor]
    run: Callable[..., Sequence[Tensor]]


class Kept:
    """What was made last, and of what."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], Any] | None = None

    def once(self, sources: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Made anew where the sources are others: a tensor is another where it was written to, and all are where
        gradients are followed and were not."""
        wanted, last = (torch.is_grad_enabled(), *map(_version, sources), *sources), self._last
        if last is None or len(last[0]) != len(wanted) or not all(map(_is_same, last[0], wanted)):
            if any(isinstance(x, Tensor) and x.is_cuda for x in sources) and torch.cuda.is_current_stream_capturing():
                return make()  # a graph reads its inputs anew at each replay
            last = self._last = (wanted, make())
        made: T = last[1]
        return made


class _OfClass:
    """What a recipe says of itself: of a module that name is the module's own, a layer's for instance."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __get__(self, module: Any, owner: type) -> Any:
        if module is not None:
            raise AttributeError  # by which nn.Module looks among its layers
        return self._value


class Recipe:
    """How one class of another code base calls attnext's kernels: a mixin that comes before that class.

    It overrides ``forward`` and what else of the interface must differ, and goes to ``super()`` wherever a kernel
    can't serve. What the original keeps between calls is kept under the same names, so that either may take over.
    """

    code_base: ClassVar[str]
    """Its name as people know it."""
    original: ClassVar[str]
    """Where the class is found in its package, ``module:Class``."""
    version: ClassVar[str]
    """The package on PyPI and the version that was looked at; what the tests install."""
    tensors: ClassVar[Sizes]
    """Names in the state_dict, and sizes: a number is that size, a letter the same size wherever it stands."""
    maybe: ClassVar[frozenset[str]] = frozenset()
    """Those of them that may be missing."""
    arguments: ClassVar[tuple[str, ...]]
    """The arguments of its forward, by name, without ``self``."""
    layers: ClassVar[Layers] = {}
    """Inner layers whose parameters the recipe reads, by path: each must do what its class does and no more."""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """Those that call kernels."""
    serves: ClassVar[str] = "all options"
    """For the table of what is supported."""
    pays: ClassVar[bool] = True
    """Whether it is faster than the original at realistic sizes: else it is swapped only where it is asked for."""
    probed: ClassVar[bool] = True
    """Whether swapped and original are compared; a decoder that only opens a scope for its attention has nothing to
    compare."""

    _original: ClassVar[type[nn.Module]]

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """Whether a module has the parameters and the arguments of this class, wherever it comes from."""
        state = module.state_dict()
        if not cls.tensors.keys() - cls.maybe <= state.keys() <= cls.tensors.keys():
            return False
        sizes: dict[str, int] = {}
        for name, tensor in state.items():
            wanted = cls.tensors[name]
            if tensor.dim() != len(wanted):
                return False
            for size, is_size in zip(wanted, tensor.shape, strict=True):
                if (sizes.setdefault(size, is_size) if isinstance(size, str) else size) != is_size:
                    return False
        return cls.has_its_arguments(type(module))

    @classmethod
    def has_its_arguments(cls, original: type[nn.Module]) -> bool:
        try:
            found = tuple(inspect.signature(original.forward).parameters)[1:]
        except (TypeError, ValueError):
            return False
        return found == cls.arguments

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        """Why a module that was recognised is left alone, such as an option that is not served; else empty."""
        return ""

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        """A few calls on small random inputs for a module of these sizes."""
        raise NotImplementedError

    def _served(self, first: Tensor, *others: Tensor | None) -> bool:
        """Whether kernels serve a call: of one dtype and device that have some, and nothing looks at the code itself.

        A traced, exported or compiled program, and torch.func or forward-mode differentiation, get the original's own
        operations; under autocast too, whose dtypes are those of each of these operations.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _checks.in_transforms():
            return False
        dtype, device = first.dtype, first.device
        for x in others:
            if x is not None and (x.dtype != dtype or x.device != device):
                return False
        kind = device.type
        if torch.is_autocast_enabled(kind) or choose(None, kind, dtype) == "reference":
            return False
        return not self.changed_layer(self)  # type: ignore[arg-type]

    @classmethod
    def changed_layer(cls, module: nn.Module) -> str:
        """The path of an inner layer that may do more than its class does; else empty."""
        if has_global_hooks():
            return "every layer"
        for path, outer, last, kind in _places(cls):  # type: ignore[arg-type]
            layer: Any = module
            for name in outer:  # wrappers, which have forwards of their own
                layer = layer._modules.get(name)
                if layer is None:
                    break
                if has_own_hooks(layer) or "forward" in layer.__dict__:
                    return path
            layer = None if layer is None else layer._modules.get(last)
            if layer is not None and (type(layer) is not kind or is_changed(layer)):
                return path
        return ""

    def _once(self, sources: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is made of things that the original keeps, or is handed at each step: anew where they are others."""
        kept: Kept = self.__dict__.setdefault(_KEPT, Kept())
        return kept.once(sources, make)

    def _forget(self) -> None:
        self.__dict__.pop(_KEPT, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept for the kernels, which is made again."""
        parent: Any = super()
        state = parent.__getstate__() if hasattr(parent, "__getstate__") else self.__dict__
        return {name: value for name, value in state.items() if name != _KEPT}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the original, so that what reads it needs no attnext."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        arguments = tuple(self._original if x is type(self) else x for x in arguments)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # which must be of an object's own class
            function, arguments = copyreg._reconstructor, (*arguments, object, None)  # type: ignore[attr-defined]
        return function, arguments, *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = self._original.__new__(self._original)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name != _KEPT})
        copied: Any = copy.deepcopy(plain, memo)
        copied.__class__ = type(self)
        memo[id(self)] = copied
        return copied

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the original, with the same parameters.

        Where a larger module is scripted, torch puts it in this one's place there, and also in the module that was
        scripted: that has the original from then on, and may be accelerated again.
        """
        found: Any = copy.copy(self)  # which is of the original's class
        found._modules = dict(found._modules)  # of which torch replaces some, likewise
        return found  # type: ignore[no-any-return]


def _version(x: Any) -> int:
    """Changes where a tensor is written to."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _is_same(one: Any, other: Any) -> bool:
    """The same object, or an equal number or text."""
    return one is other or (isinstance(one, (int, str)) and type(one) is type(other) and one == other)


def is_changed(layer: nn.Module) -> bool:
    """Whether a layer's call runs hooks, or its weight is made at each call: weight_norm, pruning, quantisation."""
    return has_own_hooks(layer) or "forward" in layer.__dict__ or layer._parameters.get("weight") is None


@cache
def _places(cls: Any) -> tuple[tuple[str, list[str], str, type[nn.Module]], ...]:
    """The layers of a recipe: path, the names of what it is in, its own name, and its class."""
    found = []
    for path, kind in cls.layers.items():
        *outer, last = path.split(".")
        found.append((path, outer, last, kind))
    return tuple(found)


class _Inert(torch.autograd.Function):
    """The first tensor itself; the others have a gradient of zeros by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def inert(x: Tensor, *others: Tensor | None) -> Tensor:
    """``x``, through which parameters that change no result have gradients of zeros and not none.

    A bias of the scores, which the softmax takes away: distributed training stops where a parameter has no gradient.
    """
    wanted = [p for p in others if p is not None and p.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return x
    result: Tensor = _Inert.apply(x, *wanted)  # type: ignore[no-untyped-call]
    return result


def visible(seen: Tensor) -> dict[str, Any]:
    """Lengths for a mask (B, Tk) that hides ends alone, True where a key is seen, as kernels then read no hidden key;
    else the mask."""
    if seen.device.type == "cpu":
        lengths = seen.sum(1)
        if bool((seen == (torch.arange(seen.shape[1]) < lengths.unsqueeze(1))).all()):
            return {"lengths": lengths}
    return {"mask": seen}


class Ready(NamedTuple):
    """What steps attend."""

    memory: Memory
    window: Tensor | None
    """The keys to the end of each row, (B, 2), where filters see the past: kernels read none in slots that a memory
    hides, and the originals hide nothing of it."""


def ready(key: Tensor, value: Tensor | None, v: Tensor | None, seen: Tensor | None, *, sees_past: bool) -> Ready:
    """A memory of projected keys (B, Tk, D), with a mask (B, Tk), True where a key is seen."""
    hides: dict[str, Any] = {} if seen is None else visible(seen)
    window = None
    if sees_past and "lengths" in hides:
        ends = hides.pop("lengths")
        window = torch.stack([torch.zeros_like(ends), ends], 1)
    return Ready(functional.prepare(key, value, v, **hides), window)


def attend(query: Tensor, memory: Memory, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Context and weights of a query (B, D) or (B, Tq, D), additive where the memory has a score weight.

    As of :func:`attnext.additive_attention`, but for its checks: the operators make those that keep memory safe.
    """
    by_score = functional.attend_by_dot if memory.score_weight is None else functional.attend
    context, weights = by_score(query, memory, scale, 0.0, True, None)
    assert weights is not None
    return context, weights


def step(
    query: Tensor,
    memory: Memory,
    filters: Tensor | None,
    projection: Tensor | None,
    *past: Tensor,
    bias: Tensor | None = None,
    rule: str = "softmax",
    window: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`attnext.additive_step`, likewise, with the weights in the context's dtype."""
    if bias is not None:
        query = query + (bias if projection is None else projection @ bias)
    context, weights = functional.attend_step(
        query, memory, filters, projection, past, rule=rule, window=window, scale=scale
    )
    return context, weights.to(context.dtype)


def layer_at(module: nn.Module, path: str) -> Any:
    """An inner layer by its path; None where there is none."""
    layer: Any = module
    for name in path.split("."):
        layer = None if layer is None else layer._modules.get(name)
    return layer


def plain_weight(module: nn.Module, path: str) -> Tensor:
    """The weight of an inner layer, which :meth:`Recipe._served` has found to be plain."""
    weight: Tensor = layer_at(module, path)._parameters["weight"]
    return weight


def _twice_differentiable(method: Callable[..., Any]) -> Callable[..., Any]:
    """Second derivatives of what kernels compute within are those of the definition."""

    @wraps(method)
    def called(*arguments: Any, **options: Any) -> Any:
        with by_definition():
            return method(*arguments, **options)

    return called


_SAID = [name for name in Recipe.__annotations__ if not name.startswith("_")]
_swapped: dict[tuple[Any, Any], Any] = {}


def swapped(recipe: type[Recipe], original: type[nn.Module]) -> Any:
    """The subclass of a class that has a recipe's forward. It has the name and the docstring of the original."""
    if (recipe, original) in _swapped:
        return _swapped[recipe, original]
    names: dict[str, Any] = {
        "__module__": recipe.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
    }
    names |= {name: _OfClass(getattr(recipe, name)) for name in _SAID if hasattr(recipe, name)}
    for method in recipe.methods:
        names[method] = _twice_differentiable(getattr(recipe, method))
    found = _swapped[recipe, original] = type(original.__name__, (recipe, original), names)
    return found


def by_name(recipes: Sequence[type[Recipe]]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: its classes as those of the code base, which must be installed, are named."""

    def find(name: str) -> Any:
        for recipe in recipes:
            module, _, found = recipe.original.partition(":")
            if found == name:
                try:
                    original = getattr(importlib.import_module(module), found)
                except (ImportError, AttributeError) as error:
                    raise ImportError(f"{found} of {recipe.code_base} is not there to be made: {error}") from error
                return swapped(recipe, original)
        raise AttributeError(f"no class {name!r}: there are {', '.join(r.original.partition(':')[2] for r in recipes)}")

    return find
