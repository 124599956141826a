"""CUDA kernels in the extension ``attnext._C``."""

from __future__ import annotations

from attnext.backends._base import Backend, Family

FAMILY = Family(("cuda",), lambda: Backend(False, "this version of attnext has no CUDA kernels yet"))
