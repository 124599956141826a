"""What is imported, and when: the compiler to compile, torch to run a command, an optional package to use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OURS = {"attnext", "attnext_command", *sys.stdlib_module_names}

BEYOND_TORCH = """
import sys
import torch
before = set(sys.modules)
{code}
print(*set(sys.modules) - before)
"""

USE = """
import attnext
query, key, value, v = (torch.randn(size, requires_grad=True) for size in ((2, 3, 8), (2, 5, 8), (2, 5, 6), (8,)))
attnext.additive_attention(query, key, value, v)[0].sum().backward()
attnext.dot_attention(query, key, value)[0].sum().backward()
attention = attnext.BahdanauAttention(4, 6, 8)
attention(torch.randn(2, 4), attention.prepare(torch.randn(2, 5, 6)))[0].sum().backward()
"""

COMMANDS = """
from attnext_command import main
for name in ("verify", "bench", "gpu-check", "train", "evaluate", "predict", "demo"):
    try:
        main([name, "--help"])
    except SystemExit:
        pass
main(["info"])
"""

# As the script does that an installer writes.
SCRIPT = """
import sys
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="attnext")
try:
    command.load()()
finally:
    print()
    print(*sys.modules)
"""


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in a folder where there is nothing of the project to find by chance."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("code", "ours"),
    [("import attnext", "attnext.ops"), (USE, "attnext.ops"), (COMMANDS, "attnext.seq2seq.session")],
    ids=["import", "use", "commands"],
)
def test_nothing_but_torch(code: str, ours: str, tmp_path: Path) -> None:
    """No compiler, and no optional package: of modules that torch hasn't imported, only the package's and Python's."""
    done = run(tmp_path, BEYOND_TORCH.format(code=code))
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert ours in modules
    assert [name for name in modules if name.partition(".")[0] not in OURS] == []


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["fly"], 2), (["--fly"], 2)]
)
def test_the_command_needs_no_torch_to_answer(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, *arguments)
    assert done.returncode == code, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "attnext_command" in modules
    assert not {"torch", "attnext"} & set(modules)
