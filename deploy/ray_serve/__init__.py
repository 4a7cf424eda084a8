# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: ``serve run vllm_lowbit.deploy.ray_serve:app config=serve.yaml``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...schema import validate
from ..config_file import read_config
from .config import ServeConfig, llm_config

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, Any]) -> "Application":
    """What ``serve run`` and a RayService start.

    Args:
        args: ``config``, the name of a file, or the contents of one.

    Raises:
        ConfigError: naming the key, before anything starts.
    """
    if set(args) == {"config"}:
        config = read_config(Path(args["config"]), ServeConfig)
    elif "config" in args:
        others = ", ".join(sorted(set(args) - {"config"}))
        raise ConfigError(f"beside config= there is {others}; edit the file instead")
    else:
        config = validate(ServeConfig, args, "arguments of the application")
    return build(config)


def build(config: ServeConfig) -> "Application":
    """The application: an OpenAI front end, and replicas of one engine."""
    from ray.serve.llm import LLMConfig, build_openai_app

    return build_openai_app(
        {
            "llm_configs": [LLMConfig(**llm_config(config))],
            "ingress_deployment_config": {
                # By default a whole core, which a small machine has not left.
                "ray_actor_options": {"num_cpus": 0.1},
                "autoscaling_config": {
                    "min_replicas": config.ingress_replicas,
                    "max_replicas": config.ingress_replicas,
                },
            },
        }
    )
