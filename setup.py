# SPDX-License-Identifier: Apache-2.0
"""Maps top-level folders to import names; everything else is in pyproject.toml.

A static list of packages would have to name every operator's folder.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "vllm_lowbit": "vllm_lowbit",
    "vllm_lowbit.kernels": "kernels",
    "vllm_lowbit.calibrate": "calibrate",
}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, path in FOLDERS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(path)))
    ],
)
