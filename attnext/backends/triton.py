"""Triton kernels (the folder ``kernels/``)."""

from __future__ import annotations

from attnext.backends._base import Backend, Family

FAMILY = Family(("cuda",), lambda: Backend(False, "this version of attnext has no Triton kernels yet"))
