# SPDX-License-Identifier: Apache-2.0
"""Start `vllm serve` with 4-bit quantization; say when it is ready and how to use it.

Standard library only, but for the hub's client, which vLLM brings. The command is
printed, so nothing here is needed to serve.
Options that are not listed below go to `vllm serve` unchanged.
"""

import argparse
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
BIND = "VLLM_CPU_OMP_THREADS_BIND"
PARALLEL = ("-tp", "-dp", "-pp", "--tensor-par", "--data-par", "--pipeline-par")
# Straight to the server, whatever http_proxy says.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class UsageError(Exception):
    """The caller's mistake: reported in one line, exit code 2."""


def is_local(model: str) -> bool:
    """True for a path, False for a name on a model hub."""
    path = Path(model)
    prefixed = model.startswith(("/", "./", "../", "~"))
    return prefixed or path.exists() or ("/" in model and path.parent.is_dir())


def local_config(model: str) -> Path:
    """config.json of a model directory, which has to be there."""
    config = Path(model).expanduser() / "config.json"
    if not config.parent.is_dir():
        raise UsageError(f"model directory {model!r} does not exist")
    if not config.is_file():
        raise UsageError(f"model directory {model!r} has no config.json")
    return config


def hub_config(model: str, passed: list[str]) -> Path | None:
    """The same of a name on the hub, None where vLLM may find it in other ways.

    Refuses a name that neither the hub nor its cache here has: vLLM takes a minute to.
    HF_HUB_OFFLINE and the like count as for vLLM itself.
    """
    words = [word for option in passed for word in option.split("=", 1)]
    elsewhere = os.environ.get("VLLM_USE_MODELSCOPE") or "--hf-config-path" in words
    # Other stores have a scheme, files of a repository a colon.
    if ":" in model or elsewhere:
        return None
    revision = dict(zip(words, words[1:], strict=False)).get("--revision")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except RemoteEntryNotFoundError:
        return None  # vLLM reads other files as well
    except (HFValidationError, OSError) as error:
        # Of a hub that cannot be reached, or is not to be.
        is_away = isinstance(error, LocalEntryNotFoundError)
        cause = error.__cause__ if is_away else None
        reason = " ".join(str(cause or error).split())
        raise UsageError(
            f"model {model!r} is not a directory, and the hub does not give it: "
            f"{reason}"
        ) from None


def is_quantized(config: Path) -> bool:
    """Whether a config.json names a quantization of its own."""
    try:
        return "quantization_config" in json.loads(config.read_text())
    except (ValueError, TypeError) as error:
        raise UsageError(f"{config} is not a JSON object: {error}") from None


def check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise UsageError(f"port {port} is not between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {HOST}:{port}: {error.strerror}"
            ) from None


def cpu_ranges(cpus: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5", the notation of VLLM_CPU_OMP_THREADS_BIND."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def extra_environment(passed: list[str]) -> dict[str, str]:
    """CPU only: left to itself vLLM keeps a core idle. Several ranks need a list each,
    and are left to vLLM or to the caller."""
    ranks = any(option.startswith(PARALLEL) for option in passed)
    if ranks or BIND in os.environ:
        return {}
    return {BIND: cpu_ranges(os.sched_getaffinity(0))}


def build_command(
    model: str, config: Path | None, port: int, on_cpu: bool, passed: list[str]
) -> list[str]:
    vllm = Path(sys.executable).parent / "vllm"
    if not vllm.exists():
        raise UsageError(f"{vllm} is missing; run `make setup` first")
    given = {option.partition("=")[0] for option in passed}
    command = [str(vllm), "serve", model]
    quantized = config is not None and is_quantized(config)
    if not quantized and not given & {"-q", "--quantization"}:
        command += ["--quantization", "lowbit"]
    # On CPU vLLM would ask for nearly all of the memory, and fail when it is not free.
    if on_cpu and "--kv-cache-memory-bytes" not in given:
        command += ["--kv-cache-memory-bytes", "1G"]
    if "--host" not in given:
        command += ["--host", HOST]
    return [*command, "--port", str(port), *passed]


def get(port: int, path: str) -> bytes | None:
    """The body of a 200 answer, else None."""
    try:
        with OPENER.open(f"http://{HOST}:{port}{path}", timeout=5) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException):
        return None


def print_requests(port: int, model: str) -> None:
    def curl(path: str, **body: Any) -> None:
        data = shlex.quote(json.dumps({"model": model, **body, "max_tokens": 32}))
        print(f"curl -s http://{HOST}:{port}/v1/{path} \\")
        print(f"  -H 'Content-Type: application/json' -d {data}\n", flush=True)

    curl("completions", prompt="The old house")
    message = {"role": "user", "content": "Tell me about the old house."}
    curl("chat/completions", messages=[message])


def supervise(command: list[str], port: int, environment: dict[str, str]) -> int:
    """Run the server to its end; its exit code, or 128 + N when signal N ended it."""
    started = time.monotonic()
    # A process group of its own, so that Ctrl-C reaches it once: through the handler.
    child = subprocess.Popen(command, env=environment, process_group=0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: child.send_signal(received))
    while child.poll() is None and get(port, "/health") is None:
        time.sleep(0.5)
    if models := get(port, "/v1/models"):
        seconds = time.monotonic() - started
        print(f"\nReady after {seconds:.0f} s. In another terminal:\n")
        print_requests(port, json.loads(models)["data"][0]["id"])
    code = child.wait()
    return code if code >= 0 else 128 - code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="model directory, or a name on a model hub")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    args, passed = parser.parse_known_args()
    try:
        on_cpu = metadata.version("vllm").endswith("+cpu")
        check_port(args.port)
        model = args.model
        local = is_local(model)
        config = local_config(model) if local else hub_config(model, passed)
        command = build_command(model, config, args.port, on_cpu, passed)
    except metadata.PackageNotFoundError:
        parser.error("vLLM is not installed; run `make setup` first")
    except UsageError as error:
        parser.error(str(error))
    extra = extra_environment(passed) if on_cpu else {}
    print(*(f"{name}={value}" for name, value in extra.items()), shlex.join(command))
    sys.stdout.flush()
    if args.dry_run:
        return 0
    # As in an activated environment: vLLM finds the tools that are installed there.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return supervise(command, args.port, {**os.environ, **extra, "PATH": path})


if __name__ == "__main__":
    sys.exit(main())
