"""ESPnet's attentions of recurrent decoders (Watanabe et al., "ESPnet: End-to-end speech processing toolkit", 2018).

FunASR's are the same classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext.compat._recipe import (
    Draw,
    Layers,
    Ready,
    Recipe,
    Sizes,
    Trial,
    attend,
    by_name,
    inert,
    is_changed,
    plain_weight,
    ready,
    step,
)
from attnext.memory import Memory

_LENGTHS = [5, 3]  # of the probe; the longest is the size, as the code base wants it
_SCORED = {"mlp_enc.weight": ("D", "H"), "mlp_enc.bias": ("D",), "mlp_dec.weight": ("D", "Q"),
           "gvec.weight": (1, "D"), "gvec.bias": (1,)}  # fmt: skip
_LOCATED = {"mlp_att.weight": ("D", "F"), "loc_conv.weight": ("F", 1, 1, "width")}
_LINEAR: dict[str, type[nn.Module]] = {"mlp_enc": nn.Linear, "mlp_dec": nn.Linear, "gvec": nn.Linear}
_FILTERS: dict[str, type[nn.Module]] = {"mlp_att": nn.Linear, "loc_conv": nn.Conv2d}
_STEP = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev", "scaling")
_WINDOW = ("last_attended_idx", "backward_window", "forward_window")


class _Additive(Recipe):
    """Steps over encoder states, of which the first since ``reset`` keeps keys, states and mask."""

    code_base = "ESPnet"
    serves = "all but han_mode"
    version = "espnet==202511"
    tensors: ClassVar[Sizes] = _SCORED
    arguments: ClassVar[tuple[str, ...]] = _STEP
    layers: ClassVar[Layers] = _LINEAR
    sees_past = True
    """Whether filters see the past, of which the original hides nothing: keys beyond the end are then hidden by a
    window, for the weights alone."""

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        return "keys that change at each step (han_mode)" if getattr(module, "han_mode", False) else ""

    def _served(self, first: Tensor, *others: Tensor | None) -> bool:
        return not getattr(self, "han_mode", False) and super()._served(first, *others)

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states, size = draw(len(_LENGTHS), max(_LENGTHS), this.mlp_enc.in_features), this.dunits
        queries = [draw(len(_LENGTHS), size) for _ in range(2)]

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            attend.reset()
            found, past = [], None
            for query in (None, *queries):
                context, past = attend(states, _LENGTHS, query, past, *cls._more(attend, query))
                found += [context, *_tensors(past)]
            attend.reset()
            context, _ = attend(states[:1], _LENGTHS[:1], queries[0][:1], None, *cls._more(attend, queries[0][:1]))
            return [*found, context]

        return Trial([states, *queries], run)

    @classmethod
    def _more(cls, attend: Any, query: Tensor | None) -> tuple[Any, ...]:
        """Further arguments of a step of the probe."""
        return ()

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._forget()

    def _ready(self, enc_hs_pad: Tensor, enc_hs_len: Any) -> Ready:
        """Keys, states and mask, kept as the original keeps them, ready for the kernels."""
        this: Any = self
        if this.pre_compute_enc_h is None:
            this.enc_h, this.h_length = enc_hs_pad, enc_hs_pad.size(1)
            this.pre_compute_enc_h = self._keys(this.mlp_enc(enc_hs_pad))
        if this.mask is None:
            this.mask = _padding(enc_hs_len, enc_hs_pad)
        return self._once((this.pre_compute_enc_h, this.enc_h, this.mask), self._prepare)

    @staticmethod
    def _keys(projected: Tensor) -> Tensor:
        """What the original keeps of projected states."""
        return projected

    def _prepare(self) -> Ready:
        this: Any = self
        v = inert(this.gvec.weight.squeeze(0), this.gvec.bias)
        return ready(this.pre_compute_enc_h, this._values(), v, ~this.mask, sees_past=this.sees_past)

    def _values(self) -> Tensor:
        this: Any = self
        states: Tensor = this.enc_h
        return states

    def _query(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        return F.linear(self._state(enc_hs_pad, dec_z), plain_weight(self, "mlp_dec"))  # type: ignore[arg-type]

    def _state(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        """Of the decoder, which is 0 before it begins."""
        this: Any = self
        rows, size = len(enc_hs_pad), this.dunits
        return enc_hs_pad.new_zeros(rows, size) if dec_z is None else dec_z.view(rows, size)

    def _uniform(self, memory: Memory, enc_hs_len: Any) -> Tensor:
        """1 / length at each key of a row: where a past begins."""
        this: Any = self
        lengths = torch.as_tensor(enc_hs_len, device=memory.key.device).to(memory.key.dtype)
        seen: Tensor = ~this.mask
        return seen.to(memory.key.dtype) / lengths.unsqueeze(-1)

    def _located(self) -> tuple[Tensor, Tensor]:
        """The filters over the past and their projection."""
        return plain_weight(self, "loc_conv").squeeze(2), plain_weight(self, "mlp_att")  # type: ignore[arg-type]


class _AttAdd(_Additive):
    sees_past = False
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttAdd"

    def forward(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Any, scaling: float = 2.0
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)  # type: ignore[misc]
        memory, query = self._ready(enc_hs_pad, enc_hs_len).memory, self._query(enc_hs_pad, dec_z)
        return attend(query, memory, scaling)


class _AttDot(_AttAdd):
    """Products of the tanh of keys and queries (Luong, Pham and Manning, "Effective approaches to attention-based
    neural machine translation", 2015, with projections of both)."""

    original = "espnet.nets.pytorch_backend.rnn.attentions:AttDot"
    tensors: ClassVar[Sizes] = {"mlp_enc.weight": ("D", "H"), "mlp_enc.bias": ("D",), "mlp_dec.weight": ("D", "Q"),
                                "mlp_dec.bias": ("D",)}  # fmt: skip
    layers: ClassVar[Layers] = {}

    @staticmethod
    def _keys(projected: Tensor) -> Tensor:
        return torch.tanh(projected)

    def _prepare(self) -> Ready:
        this: Any = self
        return ready(this.pre_compute_enc_h, this.enc_h, None, ~this.mask, sees_past=False)

    def _query(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        this: Any = self
        return torch.tanh(this.mlp_dec(self._state(enc_hs_pad, dec_z)))


class _AttLoc(_Additive):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttLoc"
    tensors = _SCORED | _LOCATED
    layers = _LINEAR | _FILTERS
    arguments: ClassVar[tuple[str, ...]] = _STEP + _WINDOW

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Tensor | None,
        att_prev: Tensor | None,
        scaling: float = 2.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z, att_prev):
            return super().forward(  # type: ignore[misc]
                enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling, last_attended_idx, backward_window, forward_window
            )
        (memory, window), query = self._ready(enc_hs_pad, enc_hs_len), self._query(enc_hs_pad, dec_z)
        past = self._uniform(memory, enc_hs_len) if att_prev is None else att_prev.view(memory.key.shape[:2])
        window = _near(window, enc_hs_pad, last_attended_idx, backward_window, forward_window)
        return step(query, memory, *self._located(), past, scale=scaling, window=window)


class _AttLocRec(_Additive):
    sees_past = False
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttLocRec"
    tensors = _SCORED | {"loc_conv.weight": ("F", 1, 1, "width"), "att_lstm.weight_ih": ("gates", "F"),
                         "att_lstm.weight_hh": ("gates", "D")}  # fmt: skip
    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev_states", "scaling")

    def forward(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev_states: Any, scaling: float = 2.0
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev_states, scaling)  # type: ignore[misc]
        this: Any = self
        memory, query = self._ready(enc_hs_pad, enc_hs_len).memory, self._query(enc_hs_pad, dec_z)
        if att_prev_states is None:
            zeros = enc_hs_pad.new_zeros(len(enc_hs_pad), this.att_dim)
            att_prev_states = self._uniform(memory, enc_hs_len), (zeros, zeros)
        past, states = att_prev_states
        seen = F.relu(this.loc_conv(past[:, None, None])).amax((2, 3))
        states = this.att_lstm(seen, states)
        context, weights = attend(query + states[0], memory, scaling)
        return context, (weights, states)


class _Covering(_Additive):
    """The past is a list of the weights of all steps, which grows in place."""

    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev_list", "scaling")

    def _filters(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Over the sum of the weights: filters, projection, bias."""
        raise NotImplementedError

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Tensor | None,
        att_prev_list: list[Tensor] | None,
        scaling: float = 2.0,
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z, *(att_prev_list or ())[:1]):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling)  # type: ignore[misc]
        (memory, window), query = self._ready(enc_hs_pad, enc_hs_len), self._query(enc_hs_pad, dec_z)
        if att_prev_list is None:
            att_prev_list = [self._uniform(memory, enc_hs_len)]
        total = torch.stack(att_prev_list).sum(0) if len(att_prev_list) > 1 else att_prev_list[0]
        filters, projection, bias = self._filters()
        context, weights = step(query, memory, filters, projection, total, bias=bias, scale=scaling, window=window)
        att_prev_list += [weights]
        return context, att_prev_list


class _AttCov(_Covering):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttCov"
    tensors = _SCORED | {"wvec.weight": ("D", 1), "wvec.bias": ("D",)}
    layers = _LINEAR | {"wvec": nn.Linear}

    def _filters(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        this: Any = self
        return plain_weight(this, "wvec").unsqueeze(-1), None, this.wvec.bias


class _AttCovLoc(_Covering):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttCovLoc"
    tensors = _SCORED | _LOCATED
    layers = _LINEAR | _FILTERS

    def _filters(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (*self._located(), None)


class _AttForward(_Additive):
    """The weights are mixed and bounded below outside the kernel, which reads no values: the context follows."""

    original = "espnet.nets.pytorch_backend.rnn.attentions:AttForward"
    tensors = _SCORED | _LOCATED
    layers = _LINEAR | _FILTERS
    arguments: ClassVar[tuple[str, ...]] = _STEP + _WINDOW

    def _values(self) -> Tensor:
        this: Any = self
        values: Tensor = this.enc_h.new_zeros(*this.enc_h.shape[:2], 1)
        return values

    def _begin(self, enc_hs_pad: Tensor) -> Tensor:
        past = enc_hs_pad.new_zeros(enc_hs_pad.shape[:2])
        past[:, 0] = 1.0
        return past

    def _attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, past: Tensor, scaling: float,
        near: tuple[int | None, int, int], stay: Any, move: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        this: Any = self
        (memory, window), query = self._ready(enc_hs_pad, enc_hs_len), self._query(enc_hs_pad, dec_z)
        window = _near(window, enc_hs_pad, *near)
        _, weights = step(query, memory, *self._located(), past, scale=scaling, window=window)
        weights = weights * (stay * past + move * F.pad(past, (1, 0))[:, :-1])
        weights = F.normalize(torch.clamp(weights, 1e-6), p=1, dim=1)
        return torch.bmm(weights.unsqueeze(1), this.enc_h).squeeze(1), weights

    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Tensor | None,
        att_prev: Tensor | None,
        scaling: float = 1.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z, att_prev):
            return super().forward(  # type: ignore[misc]
                enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling, last_attended_idx, backward_window, forward_window
            )
        past = self._begin(enc_hs_pad) if att_prev is None else att_prev
        window = last_attended_idx, backward_window, forward_window
        return self._attend(enc_hs_pad, enc_hs_len, dec_z, past, scaling, window, 1.0, 1.0)


class _AttForwardTA(_AttForward):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttForwardTA"
    tensors = _SCORED | _LOCATED | {"mlp_ta.weight": (1, "all"), "mlp_ta.bias": (1,)}
    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev", "out_prev", "scaling", *_WINDOW)

    @classmethod
    def _more(cls, attend: Any, query: Tensor | None) -> tuple[Any, ...]:
        rows = len(_LENGTHS) if query is None else len(query)
        weight = attend.mlp_ta.weight
        return (weight.new_full((rows, weight.shape[1] - attend.mlp_enc.in_features - attend.dunits), 0.3),)

    def forward(  # type: ignore[override]
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Any,
        dec_z: Tensor | None,
        att_prev: Tensor | None,
        out_prev: Tensor,
        scaling: float = 1.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> Any:
        if not self._served(enc_hs_pad, dec_z, att_prev):
            return super(_AttForward, self).forward(  # type: ignore[misc]
                enc_hs_pad, enc_hs_len, dec_z, att_prev, out_prev, scaling, last_attended_idx, backward_window,
                forward_window,
            )  # fmt: skip
        this: Any = self
        past = self._begin(enc_hs_pad) if att_prev is None else att_prev
        window, stay = (last_attended_idx, backward_window, forward_window), this.trans_agent_prob
        context, weights = self._attend(enc_hs_pad, enc_hs_len, dec_z, past, scaling, window, stay, 1 - stay)
        z = self._state(enc_hs_pad, dec_z)
        this.trans_agent_prob = torch.sigmoid(this.mlp_ta(torch.cat([context, out_prev, z], 1)))
        return context, weights


class _Heads(_Additive):
    """Heads with keys, values and weights of their own, each a kernel call."""

    tensors: ClassVar[Sizes] = {}
    layers: ClassVar[Layers] = {"mlp_o": nn.Linear}

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        heads = getattr(module, "aheads", 0)
        names = {"mlp_o.weight"}
        for h in range(heads if isinstance(heads, int) else 0):
            names |= {name.format(h) for name in cls.of_head}
        return bool(heads) and set(module.state_dict()) == names and cls.has_its_arguments(type(module))

    @classmethod
    def has_its_arguments(cls, original: type[nn.Module]) -> bool:
        """FunASR's take no further ones by name."""
        if super().has_its_arguments(original):
            return True
        return tuple(inspect.signature(original.forward).parameters)[1:] == tuple(
            name for name in cls.arguments if name != "kwargs"
        )

    of_head: tuple[str, ...] = ("mlp_q.{}.weight", "mlp_q.{}.bias", "mlp_k.{}.weight", "mlp_v.{}.weight",
                                "gvec.{}.weight", "gvec.{}.bias")  # fmt: skip

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states = draw(len(_LENGTHS), max(_LENGTHS), this.eprojs)
        queries = [draw(len(_LENGTHS), this.dunits) for _ in range(2)]

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            attend.reset()
            found, past = [], None
            for query in (None, *queries):
                context, past = attend(states, _LENGTHS, query, past)
                found += [context, *past]
            return found

        return Trial([states, *queries], run)

    @classmethod
    def changed_layer(cls, module: nn.Module) -> str:
        changed = super().changed_layer(module)
        for name in ("mlp_q", "mlp_k", "mlp_v", "gvec", "mlp_att", "loc_conv"):
            kind = nn.Conv2d if name == "loc_conv" else nn.Linear
            if any(type(layer) is not kind or is_changed(layer) for layer in getattr(module, name, ())):
                return name
        return changed

    def _ready_heads(self, enc_hs_pad: Tensor, enc_hs_len: Any) -> list[Ready]:
        this: Any = self
        if this.pre_compute_k is None or this.pre_compute_v is None:
            this.enc_h, this.h_length = enc_hs_pad, enc_hs_pad.size(1)
            this.pre_compute_k = this.pre_compute_k or [self._keys(layer(enc_hs_pad)) for layer in this.mlp_k]
            this.pre_compute_v = this.pre_compute_v or [layer(enc_hs_pad) for layer in this.mlp_v]
        if this.mask is None:
            this.mask = _padding(enc_hs_len, enc_hs_pad)
        return self._once((this.pre_compute_k, this.pre_compute_v, this.mask), self._prepare_heads)

    def _prepare_heads(self) -> list[Ready]:
        this: Any = self
        heads = zip(this.pre_compute_k, this.pre_compute_v, this.gvec, strict=True)
        return [
            ready(k, v, inert(g.weight.squeeze(0), g.bias), ~this.mask, sees_past=this.sees_past) for k, v, g in heads
        ]

    def _by_head(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None,
        attend: Callable[[int, Tensor, Ready], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        this: Any = self
        heads = self._ready_heads(enc_hs_pad, enc_hs_len)
        z = self._state(enc_hs_pad, dec_z)
        found = [attend(h, this.mlp_q[h](z), kept) for h, kept in enumerate(heads)]
        contexts, weights = zip(*found, strict=True)
        return this.mlp_o(torch.cat(contexts, 1)), [w.to(z.dtype) for w in weights]


class _AttMultiHeadDot(_Heads):
    sees_past = False
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttMultiHeadDot"
    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev", "kwargs")
    of_head = ("mlp_q.{}.weight", "mlp_q.{}.bias", "mlp_k.{}.weight", "mlp_v.{}.weight")

    @staticmethod
    def _keys(projected: Tensor) -> Tensor:
        return torch.tanh(projected)

    def _prepare_heads(self) -> list[Ready]:
        this: Any = self
        heads = zip(this.pre_compute_k, this.pre_compute_v, strict=True)
        return [ready(k, v, None, ~this.mask, sees_past=False) for k, v in heads]

    def forward(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Any, **kwargs: Any) -> Any:
        if not self._served(enc_hs_pad, dec_z):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs)  # type: ignore[misc]
        this: Any = self
        return self._by_head(
            enc_hs_pad, enc_hs_len, dec_z,
            lambda _, query, kept: attend(torch.tanh(query), kept.memory, this.scaling),
        )  # fmt: skip


class _AttMultiHeadAdd(_Heads):
    sees_past = False
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttMultiHeadAdd"
    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev", "kwargs")

    def forward(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Any, **kwargs: Any) -> Any:
        if not self._served(enc_hs_pad, dec_z):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs)  # type: ignore[misc]
        this: Any = self
        return self._by_head(
            enc_hs_pad, enc_hs_len, dec_z,
            lambda _, query, kept: attend(query, kept.memory, this.scaling),
        )  # fmt: skip


class _LocatedHeads(_Heads):
    of_head = (*_Heads.of_head, "loc_conv.{}.weight", "mlp_att.{}.weight")

    def _with_past(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Sequence[Tensor] | None,
        scaling: float,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        this: Any = self

        def of_head(h: int, query: Tensor, kept: Ready) -> tuple[Tensor, Tensor]:
            memory, window = kept
            past = self._uniform(memory, enc_hs_len) if att_prev is None else att_prev[h]
            filters, projection = this.loc_conv[h].weight.squeeze(2), this.mlp_att[h].weight
            return step(query, memory, filters, projection, past, scale=scaling, window=window)

        return self._by_head(enc_hs_pad, enc_hs_len, dec_z, of_head)


class _AttMultiHeadLoc(_LocatedHeads):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttMultiHeadLoc"
    arguments = (*_STEP, "kwargs")

    def forward(
        self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Any, scaling: float = 2.0,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not self._served(enc_hs_pad, dec_z, *(att_prev or ())):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling, **kwargs)  # type: ignore[misc]
        return self._with_past(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)


class _AttMultiHeadMultiResLoc(_LocatedHeads):
    original = "espnet.nets.pytorch_backend.rnn.attentions:AttMultiHeadMultiResLoc"
    arguments = ("enc_hs_pad", "enc_hs_len", "dec_z", "att_prev", "kwargs")

    def forward(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Tensor | None, att_prev: Any, **kwargs: Any) -> Any:
        if not self._served(enc_hs_pad, dec_z, *(att_prev or ())):
            return super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs)  # type: ignore[misc]
        this: Any = self
        return self._with_past(enc_hs_pad, enc_hs_len, dec_z, att_prev, this.scaling)


def _padding(lengths: Any, states: Tensor) -> Tensor:
    """(B, T), True beyond the end of each row."""
    ends = torch.as_tensor(lengths, device=states.device)
    return torch.arange(int(ends.max()), device=states.device) >= ends.unsqueeze(1)


def _near(window: Tensor | None, states: Tensor, last: int | None, backward: int, forward: int) -> Tensor | None:
    """The keys that a step may attend, (B, 2), near the last one where that is given; as the code base, of one row."""
    if last is None:
        return window
    if len(states) != 1:
        raise NotImplementedError("Batch attention constraining is not yet supported.")
    near = torch.tensor([[max(0, last - backward), last + forward]], device=states.device)
    return near if window is None else torch.minimum(near, window[:, 1:])


def _tensors(past: Any) -> list[Tensor]:
    """Those of whatever a step hands on."""
    return [past] if isinstance(past, Tensor) else [x for part in past for x in _tensors(part)]


RECIPES: tuple[type[Recipe], ...] = (
    _AttDot, _AttAdd, _AttLoc, _AttCov, _AttCovLoc, _AttLocRec, _AttForward, _AttForwardTA, _AttMultiHeadDot,
    _AttMultiHeadAdd, _AttMultiHeadLoc, _AttMultiHeadMultiResLoc,
)  # fmt: skip
__getattr__ = by_name(RECIPES)
