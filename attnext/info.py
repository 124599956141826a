"""What a bug report needs to know about this install: ``attnext info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

import attnext
from attnext import _extension
from attnext.backends._gpu import unusable


def collect() -> dict[str, str]:
    """One line of text per topic, in the order to be shown."""
    facts = {
        "attnext": f"{attnext.__version__} in {Path(attnext.__file__).parent}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} logical cores",
        "torch": _torch_build(),
        "torch threads": str(torch.get_num_threads()),
        "triton": _installed("triton"),
        "c++ compiler now": _compiler(),
    }
    facts.update({f"extension {key}": value for key, value in _extension_facts().items()})
    for name, backend in attnext.backends().items():
        state = "available" if backend.available else "not available"
        facts[f"backend {name}"] = f"{state}: {backend.reason}"
    return facts


def render() -> str:
    """`collect()` as plain text, to be pasted into a bug report."""
    facts = collect()
    width = max(map(len, facts))
    return "\n".join(f"{key:{width}}  {value}" for key, value in facts.items())


def _extension_facts() -> dict[str, str]:
    module, status, built = _extension.load(), _extension.status(), _extension.build_record()
    facts = {"C++": "loaded" if status.available else status.reason}
    if module is not None:
        facts["instructions"] = module.instruction_set()
        # What the library says of itself is surer than the record beside it.
        built |= module.build_info()
    cuda, missing = built.pop("cuda", ""), built.pop("cuda reason", "")
    if cuda or missing:
        facts["CUDA kernels"] = f"built with CUDA {cuda}" if cuda else f"none: {missing}"
    facts.update({f"built with {key}": value for key, value in built.items() if value and key != "reason"})
    return facts


def _torch_build() -> str:
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    toolkit = toolkit or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only")
    gpus = _gpus()
    return f"{torch.__version__} ({toolkit}), " + (f"GPUs: {', '.join(gpus)}" if gpus else "no GPU seen")


def _gpus() -> list[str]:
    """Names and compute capabilities, or why a GPU that is there can't be asked."""
    return [unusable(index) or _gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> str:
    return "{} ({}.{})".format(torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    """The compiler that an install would take now; torch.compile needs one too."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            return asked.stdout.partition("\n")[0] or " ".join(command)
    return f"none ({', '.join(names)} not found)"
