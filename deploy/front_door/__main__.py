# SPDX-License-Identifier: Apache-2.0
"""Write the configuration of nginx from a YAML file; prints how to start it."""

import argparse
import sys
from pathlib import Path

from ...errors import LowbitError
from ..config_file import read_config
from . import FrontDoor, read_keys, render


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_lowbit.deploy.front_door", description=__doc__
    )
    parser.add_argument("config", type=Path, help="a file like front-door.yaml")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        config = read_config(args.config, FrontDoor)
        path = render(config, read_keys(Path(config.keys_file)), args.output)
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"nginx -c {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
