"""What pyproject.toml can't say: the package folders and the compiled extension."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

# pip puts the folder on the path by itself; `python setup.py build_ext --inplace` needs this line.
sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from attnext_build_ext import BuildExtension, files

setup(
    packages=[*find_packages(include=["attnext", "attnext.*"]), "attnext.kernels"],
    py_modules=["attnext_command"],
    package_dir={"attnext": "attnext", "attnext.kernels": "kernels"},
    package_data={"attnext": ["py.typed"]},
    ext_modules=[Extension("attnext._C", files(".cpp", ".cu"), depends=files(".h", ".cuh"), language="c++")],
    cmdclass={"build_ext": BuildExtension},
)
