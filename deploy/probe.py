# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM server answers, by asking for a token: exit code 0 or 1.

    python -m vllm_lowbit.deploy.probe ready
    python -m vllm_lowbit.deploy.probe live

/health stays green in a server whose engine makes no tokens any more. ``ready``: a
completion comes within the time. ``live``: a completion comes, or the counters of
tokens move meanwhile; a server with a long queue is busy, not dead, and a restart would
lose all of its requests. Standard library only: it starts in a tenth of a second.
"""

import argparse
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request

# Straight to the server, whatever http_proxy says.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TOKENS = re.compile(
    rb"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE
)


def fetch(url: str, seconds: float, body: object = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with OPENER.open(request, timeout=seconds) as response:
        return bytes(response.read())


def completes(url: str, seconds: float) -> str | None:
    """None when a token comes, else what came instead."""
    body = {"prompt": "The", "max_tokens": 1, "temperature": 0}
    try:
        answer = json.loads(fetch(f"{url}/v1/completions", seconds, body))
        tokens = answer["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        return f"/v1/completions: status {error.code}: {error.read(200)!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"/v1/completions: {type(error).__name__}: {error}"
    return None if tokens == 1 else f"/v1/completions: {tokens} tokens instead of 1"


def tokens_so_far(url: str, seconds: float) -> float | None:
    """Prompt and generated tokens, None when /metrics does not tell."""
    try:
        found = TOKENS.findall(fetch(f"{url}/metrics", seconds))
    except OSError:
        return None
    return sum(map(float, found)) if found else None


def lives(url: str, seconds: float) -> str | None:
    """None when a token comes or tokens are made for others, else what is wrong."""
    before = tokens_so_far(url, seconds)
    problem = completes(url, seconds)
    if problem is None:
        return None
    after = tokens_so_far(url, seconds)
    if before is not None and after is not None and after > before:
        return None
    return f"{problem}; {before} tokens before, {after} after"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_lowbit.deploy.probe", description=__doc__
    )
    parser.add_argument("question", choices=("ready", "live"))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    # A server that sends a byte now and then would outlast every time-out of a socket.
    threading.Timer(3 * args.seconds + 1, os._exit, (1,)).start()
    ask = completes if args.question == "ready" else lives
    problem = ask(args.url, args.seconds)
    if problem is not None:
        print(problem, file=sys.stderr)
    sys.stderr.flush()
    os._exit(0 if problem is None else 1)


if __name__ == "__main__":
    main()
