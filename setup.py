"""What pyproject.toml cannot say: where the wheel's packages stand in the tree, and the compiled helper.

The wheel has one package, `megatron`, and one module, `pretrain_gpt2`: `tools/` and `recipes/` become a part of the
package, since top-level packages of such names would meet those of others in an environment.

The helper of the sample index is built where a compiler and pybind11 are there, and left out elsewhere. Everything
works without it, with the same results.
"""

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # installed with --no-build-isolation, where pybind11 may be missing
    extensions = []
else:
    extensions = [
        Pybind11Extension("megatron.data._sample_index", ["megatron/data/sample_index.cpp"], cxx_std=17, optional=True)
    ]

setup(
    packages=[*find_packages(include=["megatron", "megatron.*"]), "megatron.tools", "megatron.recipes"],
    package_dir={"megatron.tools": "tools", "megatron.recipes": "recipes"},
    py_modules=["pretrain_gpt2"],
    ext_modules=extensions,
)
