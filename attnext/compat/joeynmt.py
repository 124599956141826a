"""JoeyNMT's attentions (Kreutzer, Bastings and Riezler, "Joey NMT: a minimalist NMT toolkit for novices", 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, plain_weight, visible

_VERSION = "joeynmt==2.3.0"


class _OneQuery(Scoped):
    """Steps of one query over keys that ``compute_proj_keys`` keeps; states and mask are given at each."""

    code_base = "JoeyNMT"
    version = _VERSION
    arguments = ("query", "mask", "values")

    @classmethod
    def query_size(cls, module: Any) -> int:
        raise NotImplementedError

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states, size = draw(2, 5, this.key_layer.in_features), cls.query_size(this)
        queries = [draw(2, 1, size) for _ in range(2)]
        mask = torch.tensor([[[True] * 5], [[True] * 3 + [False] * 2]])

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            attend.compute_proj_keys(states)
            return [x for query in queries for x in attend(query=query, mask=mask, values=states)]

        return Trial([states, *queries], run)

    def forward(self, query: Tensor, mask: Tensor, values: Tensor) -> Any:
        this: Any = self
        if this.proj_keys is None or not self._served(query, values, this.proj_keys):
            return super().forward(query, mask, values)  # type: ignore[misc]
        this._check_input_shapes_forward(query=query, mask=mask, values=values)
        keys: Tensor = this.proj_keys

        def make() -> dict[str, Any]:
            v = self._score_weight()
            weight = {} if v is None else {"score_weight": v}
            return {"key": keys, "value": values, **weight, **visible((mask > 0).squeeze(1))}

        return self._weigh(self._projected(query), (keys, values, mask), make)

    def _projected(self, query: Tensor) -> Tensor:
        """As the score takes it."""
        return query

    def _score_weight(self) -> Tensor | None:
        """The vector of an additive score."""
        return None


class _BahdanauAttention(_OneQuery):
    original = "joeynmt.attention:BahdanauAttention"
    tensors: ClassVar[Sizes] = {"key_layer.weight": ("D", "E"), "query_layer.weight": ("D", "Q"),
                                "energy_layer.weight": (1, "D")}  # fmt: skip
    layers: ClassVar[Layers] = {"energy_layer": nn.Linear}

    @classmethod
    def query_size(cls, module: Any) -> int:
        size: int = module.query_layer.in_features
        return size

    def _projected(self, query: Tensor) -> Tensor:
        this: Any = self
        this.compute_proj_query(query)
        projected: Tensor = this.proj_query
        return projected

    def _score_weight(self) -> Tensor:
        return plain_weight(self, "energy_layer").squeeze(0)  # type: ignore[arg-type]


class _LuongAttention(_OneQuery):
    original = "joeynmt.attention:LuongAttention"
    tensors: ClassVar[Sizes] = {"key_layer.weight": ("D", "E")}

    @classmethod
    def query_size(cls, module: Any) -> int:
        size: int = module.key_layer.out_features
        return size


class _RecurrentDecoder(Loop):
    code_base = "JoeyNMT"
    version = _VERSION
    original = "joeynmt.decoders:RecurrentDecoder"
    arguments = ("trg_embed", "encoder_output", "encoder_hidden", "src_mask", "unroll_steps", "hidden",
                 "prev_att_vector", "kwargs")  # fmt: skip
    attends = (("attention", _BahdanauAttention), ("attention", _LuongAttention))

    def forward(
        self, trg_embed: Tensor, encoder_output: Tensor, encoder_hidden: Tensor, src_mask: Tensor, unroll_steps: int,
        hidden: Any = None, prev_att_vector: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        with self._scope(unroll_steps):
            return super().forward(  # type: ignore[misc]
                trg_embed, encoder_output, encoder_hidden, src_mask, unroll_steps, hidden, prev_att_vector, **kwargs
            )


RECIPES: tuple[type[Recipe], ...] = (_BahdanauAttention, _LuongAttention, _RecurrentDecoder)
__getattr__ = by_name(RECIPES)
