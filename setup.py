"""What pyproject.toml cannot say: where the wheel's packages stand in the tree.

The wheel has one package, `megatron`, and one module, `pretrain_gpt2`: `tools/` and `recipes/` become a part of the
package, since top-level packages of such names would meet those of others in an environment.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron", "megatron.*"]), "megatron.tools", "megatron.recipes"],
    package_dir={"megatron.tools": "tools", "megatron.recipes": "recipes"},
    py_modules=["pretrain_gpt2"],
)
