"""The compiled helper of the sample index: built where a compiler and pybind11 are there, left out elsewhere.

Everything works without it, with the same results. The rest of the installation is in pyproject.toml.
"""

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # installed with --no-build-isolation, where pybind11 may be missing
    extensions = []
else:
    extensions = [
        Pybind11Extension("megatron.data._sample_index", ["megatron/data/sample_index.cpp"], cxx_std=17, optional=True)
    ]

setup(ext_modules=extensions)
