"""The checks of ``attnext gpu-check`` on the CUDA kernels, compiled for the CPU.

    python tests/gpu_checks.py contract|running LIBRARY

A program of its own: the library registers the CUDA operators for CPU tensors.
"""

from __future__ import annotations

import importlib
import sys

from cuda_cases import serve_cuda_on_cpu

from attnext.gpu.checking import main

if __name__ == "__main__":
    name, library = sys.argv[1:]
    serve_cuda_on_cpu(library)
    checks = importlib.import_module(f"attnext.gpu.{name}")
    sys.exit(main(name, checks.checks_of, ["cuda", "--device", "cpu"], deterministic=name == "contract"))
