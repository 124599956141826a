"""Argument checks: each error names the argument, what it got and what it takes, before any kernel runs."""

from __future__ import annotations

import numbers
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.bfloat16, torch.float16)
"""Half types, in which the memory of float32 may be held."""
LARGEST = torch.finfo(torch.float32).max
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor(name: str, x: object, *ranks: int) -> Tensor:
    """``x`` as a tensor of one of these ranks."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {wanted} dimensions, got {x.dim()}: shape {tuple(x.shape)}")
    return x


def size(name: str, x: Tensor, dim: int, expected: int, of: str) -> None:
    """Size ``dim`` of ``x`` agrees with that of another argument."""
    if x.shape[dim] != expected:
        dim %= x.dim()
        raise ValueError(f"{name} must have size {expected} in dimension {dim}, as {of}, got shape {tuple(x.shape)}")


def same_kind(query: Tensor, **others: Tensor) -> None:
    """One floating dtype (or one that autocast will make of them) and one device."""
    floating("query", query.dtype)
    for name, x in others.items():
        _kind(name, x, query.dtype, query.device, "query's")


def same_kind_as_key(key: Tensor, **others: Tensor) -> None:
    """The same of what is given with a key alone."""
    floating("key", key.dtype)
    for name, x in others.items():
        _kind(name, x, key.dtype, key.device, "the key's")


def same_kind_as_module(name: str, x: Tensor, parameter: Tensor | None) -> None:
    """The same of an argument and a module's parameters, where it has any."""
    if parameter is None:
        floating(name, x.dtype)
    else:
        _kind(name, x, parameter.dtype, parameter.device, "the module's")


def _kind(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, whose: str) -> None:
    floating(name, x.dtype)
    if x.device != device:
        raise ValueError(f"{name} must be on {whose} device {device}, got {x.device}")
    if x.dtype != dtype and not (torch.float64 not in (x.dtype, dtype) and autocasts(device.type)):
        raise TypeError(f"{name} must have {whose} dtype {dtype}, got {x.dtype}")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; torch has none for some device types, "meta" for one."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def in_transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def additive(query: object, key: object, score_weight: object) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of a score: query (B, [Tq,] D), key (B, Tk, D), score_weight ([heads,] D)."""
    query, key = dot(query, key)
    return query, key, weight_of_score(score_weight, query, "query's last dimension")


def weight_of_score(x: object, of: Tensor, whose: str) -> Tensor:
    """``score_weight`` ([heads,] D), for a tensor (B, ..., D)."""
    x = tensor("score_weight", x, 1, 2)
    size("score_weight", x, -1, of.shape[-1], whose)
    if x.dim() == 2 and (x.shape[0] == 0 or of.shape[0] % x.shape[0]):
        raise ValueError(
            f"score_weight must have a number of heads of which the batch, {of.shape[0]}, is a multiple, got shape "
            f"{tuple(x.shape)}"
        )
    return x


def dot(query: object, key: object) -> tuple[Tensor, Tensor]:
    """The arguments of a dot product: query (B, [Tq,] D), key (B, Tk, D)."""
    query = sized("query", query, 2, 3)
    key = tensor("key", key, 3)
    size("key", key, 0, query.shape[0], "query's batch")
    size("key", key, 2, query.shape[-1], "query's last dimension")
    return query, key


def sized(name: str, x: object, *ranks: int) -> Tensor:
    """``x`` as a tensor of one of these ranks, with an attention size."""
    x = tensor(name, x, *ranks)
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have an attention size (last dimension) of at least 1, got {tuple(x.shape)}")
    return x


def value(x: object, key: Tensor) -> Tensor:
    """``value`` (B, Tk, H)."""
    x = tensor("value", x, 3)
    size("value", x, 0, key.shape[0], "key")
    size("value", x, 1, key.shape[1], "key")
    return x


def fits(query: object, size: int, like: Tensor, held: bool = False) -> bool:
    """Whether a query is right at a glance: of rank 2 or 3, of this last size, and as a tensor that was checked; or of
    float32 beside one that may be ``held`` in a half type.

    Most are, and a small step is short. Where it says no, the checks above say why, or that autocast makes it right.
    """
    return (
        isinstance(query, Tensor)
        and query.dim() in (2, 3)
        and query.shape[-1] == size
        and (query.dtype == like.dtype or (held and query.dtype == torch.float32 and like.dtype in HALVES))
        and query.device == like.device
        and query.layout == torch.strided
    )


def holding(dtype: object, key: Tensor) -> torch.dtype | None:
    """The dtype that a memory is to be held in, which is another than its keys'; None where it is theirs."""
    if dtype is None or dtype == key.dtype:
        return None
    if dtype not in HALVES:
        raise TypeError(f"dtype must be None, bfloat16 or float16, in which a memory is held, got {dtype}")
    if key.dtype != torch.float32:
        raise TypeError(f"dtype must be None for a memory of {key.dtype}, got {dtype}: of float32 one is held in it")
    return dtype


def _readable(x: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, outside compilation, and not of a batch that vmap goes over."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(x)


def lengths(x: object, key: Tensor) -> Tensor | None:
    """``lengths`` as int64 (B,), each from 0 to Tk, where that can be read."""
    if x is None:
        return None
    x = tensor("lengths", x, 1)
    batch, keys = key.shape[:2]
    if x.dtype not in _INTEGERS:
        raise TypeError(f"lengths must be a tensor of integers, got {x.dtype}")
    size("lengths", x, 0, batch, "the batch")
    if x.device != key.device:
        raise ValueError(f"lengths must be on the device of the keys, {key.device}, got {x.device}")
    if _readable(x):
        values = x.tolist()
        if values and not 0 <= min(values) <= max(values) <= keys:
            bad = next(n for n in values if not 0 <= n <= keys)
            raise ValueError(f"lengths must lie between 0 and the number of keys, {keys}, got {bad}")
    return x.to(torch.int64)


def mask(x: object, key: Tensor, queries: int | None) -> Tensor | None:
    """``mask`` as bool (B, Tk) or, where there are queries, (B, Tq, Tk)."""
    if x is None:
        return None
    x = tensor("mask", x, *((2,) if queries is None else (2, 3)))
    if x.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a key may be attended, got {x.dtype}")
    size("mask", x, 0, key.shape[0], "the batch")
    size("mask", x, -1, key.shape[1], "the number of keys")
    if x.dim() == 3 and queries is not None:
        size("mask", x, 1, queries, "the number of queries")
    if x.device != key.device:
        raise ValueError(f"mask must be on the device of the keys, {key.device}, got {x.device}")
    return x


def _number(name: str, x: object) -> float:
    """A number of Python's or another library's, but no bool."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return x
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    return float(x)


def scale(x: object) -> float:
    """A finite number, of float32 too, in which scores are made."""
    x = _number("scale", x)
    if not abs(x) <= LARGEST:
        raise ValueError(f"scale must be finite in float32, got {x}")
    return float(x)


def probability(name: str, x: object) -> float:
    """A number from 0 to 1."""
    x = _number(name, x)
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {x}")
    return float(x)


def flag(name: str, x: object) -> bool:
    """True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")
    return x


def floating(name: str, x: object) -> torch.dtype:
    """A dtype that the operators take."""
    if x not in _FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x}")
    return x


def indices(name: str, x: object, size: int, device: torch.device) -> Tensor:
    """``x`` as int64 (N,), each from 0 to size - 1, where that can be read."""
    x = tensor(name, x, 1)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be a tensor of integers, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on the memory's device {device}, got {x.device}")
    if _readable(x):
        bad = [n for n in x.tolist() if not 0 <= n < size]
        if bad:
            raise ValueError(f"{name} must lie between 0 and {size - 1}, got {bad[0]}")
    return x.to(torch.int64)


def at_least_one(name: str, x: object) -> int:
    """An integer of at least 1."""
    if not isinstance(x, numbers.Integral) or isinstance(x, bool) or x < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {x!r}")
    return int(x)


def positive(name: str, x: object) -> float:
    """A finite number above 0."""
    x = _number(name, x)
    if not 0.0 < x <= sys.float_info.max:
        raise ValueError(f"{name} must be above 0 and finite, got {x}")
    return float(x)


def choice(name: str, x: object, choices: tuple[str, ...]) -> str:
    """One of a few names."""
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {x!r}")
    return str(x)


def pasts(x: object, query: Tensor, keys: int) -> tuple[Tensor, ...]:
    """``past``: a tensor, or up to two, of a weight for each key."""
    found = (x,) if isinstance(x, Tensor) else x
    if not isinstance(found, (tuple, list)):
        raise TypeError(f"past must be a torch.Tensor or up to two of them, got {type(x).__name__}")
    if len(found) > 2:
        raise ValueError(f"past must be a torch.Tensor or up to two of them, got {len(found)}")
    return tuple(of_rows("past", one, query, keys, "the number of keys") for one in found)


def filters(x: object, projection: object, bias: object, pasts: int, query: Tensor) -> None:
    """Filters (F, C, width) over C pasts, their bias (F,), and a projection (D, F) without which F is D."""
    if x is None:
        for name, other in (("projection", projection), ("bias", bias)):
            if other is not None:
                raise ValueError(f"{name} must be None without filters, got {type(other).__name__}")
        if pasts:
            raise ValueError(f"past must be left out without filters, got {pasts}")
        return
    x = tensor("filters", x, 3)
    if _filters_fit(x, projection, bias, pasts, query):
        return
    of = {"filters": x}
    if pasts == 0:
        raise ValueError("past must be a torch.Tensor or two of them with filters, got none")
    size("filters", x, 1, pasts, "the number of pasts")
    if x.shape[0] == 0 or x.shape[2] % 2 == 0:
        raise ValueError(f"filters must be (F, C, width), F at least 1 and the width odd, got shape {tuple(x.shape)}")
    if projection is None:
        size("filters", x, 0, query.shape[-1], "query's last dimension where there is no projection")
    else:
        of["projection"] = projection = tensor("projection", projection, 2)
        size("projection", projection, 0, query.shape[-1], "query's last dimension")
        size("projection", projection, 1, x.shape[0], "the number of filters")
    if bias is not None:
        of["bias"] = bias = tensor("bias", bias, 1)
        size("bias", bias, 0, x.shape[0], "the number of filters")
    same_kind(query, **of)


def _filters_fit(x: Tensor, projection: object, bias: object, pasts: int, query: Tensor) -> bool:
    """Whether they are right at a glance."""
    (count, channels, width), size = x.shape, query.shape[-1]
    return (
        channels == pasts > 0 < count
        and width % 2 == 1
        and _is(x, x.shape, query, (query.dtype,))
        and (count == size if projection is None else _is(projection, (size, count), query, (query.dtype,)))
        and (bias is None or _is(bias, (count,), query, (query.dtype,)))
    )


def _is(x: object, shape: tuple[int, ...], query: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    return (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype in dtypes
        and x.device == query.device
        and x.layout == torch.strided
    )


def of_rows(name: str, x: object, query: Tensor, last: int, what: str, integers: bool = False) -> Tensor:
    """(B, last) or (B, Tq, last), as the query is (B, D) or (B, Tq, D); of a floating dtype, or of integers."""
    if isinstance(x, Tensor) and _is(x, (*query.shape[:-1], last), query, _INTEGERS if integers else _FLOATS):
        return x
    x = tensor(name, x, query.dim())
    if not integers:
        floating(name, x.dtype)
    elif x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be a tensor of integers, got {x.dtype}")
    for dim in range(query.dim() - 1):
        size(name, x, dim, query.shape[dim], "query")
    size(name, x, -1, last, what)
    if x.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    return x


def previous(x: object, rule: str, query: Tensor, keys: int) -> Tensor | None:
    """``previous``, which forward attention takes and no other rule."""
    if rule == "forward":
        return of_rows("previous", x, query, keys, "the number of keys")
    if x is not None:
        raise ValueError(f"previous must be None for rule={rule!r}, got {type(x).__name__}")
    return None


def transition(x: object, rule: str, query: Tensor) -> Tensor | None:
    """``transition``, which forward attention may have."""
    if x is None:
        return None
    if rule != "forward":
        raise ValueError(f"transition must be None for rule={rule!r}, got {type(x).__name__}")
    return of_rows("transition", x, query, 1, "one for each query")


def window(x: object, query: Tensor) -> Tensor | None:
    """``window`` as int64: the first key of each query and the one after the last."""
    if x is None:
        return None
    return of_rows("window", x, query, 2, "the first key and the one after the last", integers=True).to(torch.int64)
