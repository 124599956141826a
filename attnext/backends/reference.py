"""Plain PyTorch, on any device: slow, differentiable to any order."""

from __future__ import annotations

from attnext.backends._base import Backend, Family

FAMILY = Family((), lambda _: Backend(True, "plain PyTorch, any device"))
