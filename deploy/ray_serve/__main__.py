# SPDX-License-Identifier: Apache-2.0
"""Write the KubeRay RayService of a configuration file to standard output."""

import argparse
import sys
from pathlib import Path

import yaml

from ...errors import LowbitError
from ..config_file import read_config
from .config import ServeConfig
from .kuberay import ray_service


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_lowbit.deploy.ray_serve", description=__doc__
    )
    parser.add_argument("config", type=Path, help="a file like serve.yaml")
    args = parser.parse_args()
    try:
        config = read_config(args.config, ServeConfig)
        document = ray_service(config)
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(yaml.safe_dump(document, sort_keys=False, width=88), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
