"""Which packages the peers are in, and how their attention files are imported without what they depend on.

    python -m attnext.bench.code_bases.packages    install them, without dependencies, each into its own folder

A file of attention imports little of its package, but the package's own ``__init__`` imports everything. So a package
may be a skeleton here, an empty module with the real folder as its path, and what is imported and never called a
stand-in.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / ".peers"


@dataclass(frozen=True)
class Package:
    """A peer on PyPI.

    Attributes:
        requirements: what pip installs, pinned, without dependencies.
        skeletons: packages whose own code is not run.
        stand_ins: modules that are not there, by name: what must be found in them; anything else in them is a class
            that does nothing. A function gets the folder of the package.
    """

    requirements: tuple[str, ...]
    skeletons: tuple[str, ...] = ()
    stand_ins: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    pip: tuple[str, ...] = ()


def _exported(package: str, **files: str) -> None:
    """Puts into a skeleton what its own code would take from its files."""
    for name, file in files.items():
        setattr(sys.modules[package], name, getattr(importlib.import_module(f"{package}.{file}"), name))


def _of_torchmil(_: Path) -> dict[str, Any]:
    _exported("torchmil.nn", masked_softmax="utils", LazyLinear="utils")
    return {}


def _of_openspeech(_: Path) -> dict[str, Any]:
    _exported("openspeech.modules", Linear="wrapper", View="wrapper", DotProductAttention="dot_product_attention")
    _exported("openspeech.modules", AdditiveAttention="additive_attention")
    _exported("openspeech.modules", LocationAwareAttention="location_aware_attention")
    _exported("openspeech.decoders", OpenspeechDecoder="openspeech_decoder")
    sys.modules["openspeech.modules"].MultiHeadAttention = Nothing  # type: ignore[attr-defined]
    return {}


def _of_mmocr(_: Path) -> dict[str, Any]:
    module = importlib.import_module("torch.nn").Module
    base = type("BaseModule", (module,), {"__init__": lambda self, init_cfg=None: module.__init__(self)})
    return {
        "mmengine": {}, "mmengine.model": {"BaseModule": base}, "mmocr.registry": {}, "mmocr.structures": {},
        "mmocr.models.common": {}, "mmocr.models.common.dictionary": {"Dictionary": types.SimpleNamespace},
    }  # fmt: skip


def _of_allennlp(folder: Path) -> dict[str, Any]:
    softmax = parts(folder / "allennlp/nn/util.py", "masked_softmax", "tiny_value_of_dtype",
                    torch=importlib.import_module("torch"))  # fmt: skip
    registrable = type("Registrable", (), {"register": staticmethod(lambda _: lambda decorated: decorated)})
    return {
        "allennlp.common.registrable": {"Registrable": registrable}, "allennlp.nn": {}, "allennlp.nn.util": softmax,
    }  # fmt: skip


def _of_fairseq(folder: Path) -> dict[str, Any]:
    typing, module = importlib.import_module("typing"), importlib.import_module("torch.nn").Module
    state = importlib.import_module("fairseq.incremental_decoding_utils").FairseqIncrementalState
    decoder = type("FairseqDecoder", (module,), {"__init__": lambda self, dictionary: module.__init__(self)})
    names = {name: getattr(typing, name) for name in ("Dict", "Optional")}
    steps = parts(folder / "fairseq/utils.py", "get_incremental_state", "set_incremental_state",
                  Tensor=importlib.import_module("torch").Tensor, **names)  # fmt: skip
    _exported("fairseq.modules", FairseqDropout="fairseq_dropout")
    sys.modules["fairseq.modules"].AdaptiveSoftmax = Nothing  # type: ignore[attr-defined]
    return {
        "fairseq.checkpoint_utils": {}, "fairseq.data": {}, "fairseq.data.data_utils": {}, "fairseq.utils": steps,
        "fairseq.models": {
            "__path__": [str(folder / "fairseq/models")],
            "FairseqIncrementalDecoder": type("FairseqIncrementalDecoder", (state, decoder), {}),
            "register_model": lambda *_: lambda decorated: decorated,
            "register_model_architecture": lambda *_, **__: lambda decorated: decorated,
        },
    }  # fmt: skip


PACKAGES: dict[str, Package] = {
    "espnet": Package(
        ("espnet==202511",),
        stand_ins={
            "editdistance": {}, "humanfriendly": {}, "six": {}, "torch_complex": {}, "torch_complex.tensor": {},
            "typeguard": {"typechecked": lambda f=None, **_: f or (lambda g: g)},
            "espnet.asr.asr_utils": {}, "espnet.nets.e2e_asr_common": {}, "espnet.nets.ctc_prefix_score": {},
        },
    ),
    "speechbrain": Package(
        ("speechbrain==1.1.2",),
        ("speechbrain", "speechbrain.nnet", "speechbrain.nnet.loss", "speechbrain.dataio", "speechbrain.utils",
         "speechbrain.lobes", "speechbrain.lobes.models", "speechbrain.lobes.models.transformer"),
        lambda folder: {
            "tqdm": {}, "speechbrain.dataio.audio_io": {}, "speechbrain.utils.torch_audio_backend": {},
            "speechbrain.utils.logger": {"get_logger": logging.getLogger},
            "speechbrain.lobes.models.transformer.Transformer": parts(
                folder / "speechbrain/lobes/models/transformer/Transformer.py", "get_mask_from_lengths",
                torch=importlib.import_module("torch"),
            ),
        },
    ),
    "torchaudio": Package(("torchaudio==2.11.1",), ("torchaudio", "torchaudio.models")),
    "nemo_toolkit": Package(
        ("nemo_toolkit==3.0.0",),
        ("nemo", "nemo.collections", "nemo.collections.tts", "nemo.collections.tts.modules"),
        lambda _: {
            "nemo.core": {}, "nemo.core.neural_types": {}, "nemo.core.neural_types.elements": {},
            "nemo.core.neural_types.neural_type": {}, "nemo.utils": {"logging": logging},
            "nemo.core.classes": {
                "NeuralModule": importlib.import_module("torch.nn").Module,
                "adapter_mixins": types.SimpleNamespace(
                    AdapterModuleMixin=type("AdapterModuleMixin", (), {"is_adapter_available": lambda _: False})
                ),
            },
            "nemo.collections.tts.parts": {}, "nemo.collections.tts.parts.utils": {},
            "nemo.collections.tts.parts.utils.helpers": {},
        },
    ),
    "tacotron2-model": Package(
        ("tacotron2-model==0.2.4",), ("tacotron2_model",),
        {"librosa": {}, "librosa.filters": {}, "librosa.util": {}},
    ),
    "stanza": Package(("stanza==1.15.0",), ("stanza", "stanza.models", "stanza.models.common")),
    "rl4co": Package(
        ("rl4co==0.7.0",),
        ("rl4co", "rl4co.models", "rl4co.models.zoo", "rl4co.models.zoo.ptrnet", "rl4co.utils"),
        lambda folder: {
            "rl4co.utils.decoding": {},
            "rl4co.utils.ops": parts(folder / "rl4co/utils/ops.py", "gather_by_index",
                                     torch=importlib.import_module("torch")),
        },
    ),
    "torchmil": Package(
        ("torchmil==1.0.2",), ("torchmil", "torchmil.nn", "torchmil.nn.attention"), _of_torchmil,
    ),
    "python-doctr": Package(
        ("python-doctr==1.1.0",),
        ("doctr", "doctr.models", "doctr.models.recognition", "doctr.models.recognition.sar"),
        {
            "torchvision": {}, "torchvision.models": {}, "torchvision.models._utils": {},
            "doctr.datasets": {"VOCABS": {"french": "abc"}}, "doctr.models.classification": {},
            "doctr.models.utils": {}, "doctr.models.recognition.core": {},
        },
    ),
    "mmocr": Package(
        ("mmocr==1.0.1",),
        ("mmocr", "mmocr.models", "mmocr.models.textrecog", "mmocr.models.textrecog.decoders"), _of_mmocr,
    ),
    "allennlp": Package(
        ("allennlp==2.10.1",),
        ("allennlp", "allennlp.modules", "allennlp.modules.attention", "allennlp.common"), _of_allennlp,
    ),
    "openspeech-core": Package(
        ("openspeech-core==0.4.0",), ("openspeech", "openspeech.modules", "openspeech.decoders"), _of_openspeech,
    ),
    "funasr": Package(
        ("funasr==1.4.16",),
        ("funasr", "funasr.models", "funasr.models.language_model", "funasr.models.language_model.rnn",
         "funasr.models.transducer", "funasr.models.transformer", "funasr.models.transformer.utils"),
        {"six": {"integer_types": (int,), "moves": types.SimpleNamespace(range=range)}},
    ),
    "coqui-tts": Package(
        ("coqui-tts==0.28.0",),
        ("TTS", "TTS.tts", "TTS.tts.layers", "TTS.tts.layers.tacotron"),
    ),
    "keras": Package(
        ("keras==3.15.1", "absl-py==2.5.1", "h5py==3.16.0", "namex==0.1.0", "optree==0.20.0"),
        environment={"KERAS_BACKEND": "torch"},
    ),
    "OpenNMT-py": Package(("OpenNMT-py==3.5.1",), ("onmt", "onmt.decoders", "onmt.utils")),
    "eole": Package(("eole==0.6.4",), ("eole", "eole.decoders", "eole.modules", "eole.utils")),
    "joeynmt": Package(("joeynmt==2.3.0",), ("joeynmt",), {"joeynmt.helpers": {}}),
    "fairseq": Package(
        ("fairseq==0.12.2",), ("fairseq", "fairseq.models.speech_to_text", "fairseq.modules"), _of_fairseq,
        pip=("--only-binary=:all:", "--python-version=3.8", "--platform=manylinux1_x86_64",
             "--platform=manylinux_2_5_x86_64"),
    ),
}  # fmt: skip
"""By the name of the folder."""


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=_Anything):
    """Takes the place of what is imported and not used: a base class, a decorator, a function."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        decorates = cls is Nothing and len(arguments) == 1 and not options
        if decorates and isinstance(arguments[0], (type, types.FunctionType)):
            return arguments[0]
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return Nothing(*arguments, **options)

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


def parts(path: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Functions and classes of a file, without the rest of it."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope: dict[str, Any] = dict(known)
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return {name: scope[name] for name in names}


_prepared: set[str] = set()


def load(package: str, module: str) -> Any:
    """A module of a peer's package.

    Raises:
        FileNotFoundError: the packages are not installed.
    """
    folder = FOLDER / package
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: run `make peers`")
    if package not in _prepared:
        _prepare(package, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what newer versions of torch will not have
        return importlib.import_module(module)


def _prepare(package: str, folder: Path) -> None:
    peer = PACKAGES[package]
    os.environ.update(peer.environment)
    sys.path.insert(0, str(folder))
    for name in peer.skeletons:
        _put(name, types.ModuleType(name), [str(folder.joinpath(*name.split(".")))])
    stand_ins = peer.stand_ins(folder) if callable(peer.stand_ins) else peer.stand_ins
    for name, contents in stand_ins.items():
        stand_in = _StandIn(name)
        stand_in.__dict__.update(contents)
        _put(name, stand_in, contents.get("__path__", []))
    logging.getLogger().addFilter(lambda record: record.levelno > logging.WARNING)  # one at each call, of some
    _prepared.add(package)


def _put(name: str, module: types.ModuleType, path: list[str]) -> None:
    if name in sys.modules and not isinstance(sys.modules[name], _StandIn) and name not in sys.stdlib_module_names:
        return  # the real one is installed
    module.__path__ = path
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = path
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def install(folder: Path = FOLDER) -> None:
    """Installs what is not there in the wanted versions."""
    for name, peer in PACKAGES.items():
        target, stamp = folder / name, folder / f"{name}.txt"
        wanted = "\n".join(peer.requirements)
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        print(f"{name}: {' '.join(peer.requirements)}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*command, "--target", str(target), *peer.pip, *peer.requirements], check=True)
        stamp.write_text(wanted)


if __name__ == "__main__":
    install(*(Path(argument) for argument in sys.argv[1:]))
