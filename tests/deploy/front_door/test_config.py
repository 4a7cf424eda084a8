# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the front door's files are named before nginx starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lowbit.deploy.config_file import read_config
from vllm_lowbit.deploy.front_door import FrontDoor, read_keys
from vllm_lowbit.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "deploy" / "front_door" / "front-door.yaml"
KEY = "0123456789-ABCDEFGHIJ-abcdef"
GOOD = "upstreams: [127.0.0.1:8000]\nkeys_file: /etc/keys\n"


def test_example() -> None:
    config = read_config(EXAMPLE, FrontDoor)
    assert config.upstreams == ("127.0.0.1:8000",)
    assert config.limits.requests_per_minute == 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: the file is empty"),
        ("upstreams: [127.0.0.1:8000]\n", ":1: key keys_file is missing"),
        (GOOD + "lisen: a:1\n", ":3: key lisen does not exist; did you mean listen?"),
        (
            GOOD + "limits:\n  body_byte: 1\n",
            ":4: key limits.body_byte does not exist; did you mean body_bytes? known: ",
        ),
        (GOOD + "limits:\n  burst: many\n", ":4: key limits.burst: Input should be a"),
        (GOOD + "limits: {burst: 0}\n", ":3: key limits.burst: Input should be gr"),
        (GOOD + "limits: 3\n", ":3: key limits: must hold keys"),
        (GOOD + "listen: 8080\n", ":3: key listen: Input should be a valid string"),
        (
            GOOD + "listen: a:99999\n",
            "listen: must be HOST:PORT, got 'a:99999'",
        ),
        (GOOD + "listen: 'a;b:80'\n", ":3: key listen: must be HOST:PORT"),
        (GOOD + "access_log: a.log\n", ":3: key access_log: must be an absolute path"),
        (GOOD + "access_log: '/a;b'\n", ":3: key access_log: must be an absolute path"),
        (
            GOOD + "trusted_proxies: [10.0.0.1/8]\n",
            ":3: key trusted_proxies[0]: must",
        ),
        (
            GOOD + "routes: [{path: /metrics, method: GET}]\n",
            ":3: key routes[0].path: ",
        ),
        (
            GOOD + "routes: [{path: /v1/a, methd: GET}]\n",
            "[0].methd does not exist; did you mean method?",
        ),
        (GOOD + "upstreams: [a:1]\n", ":3: key upstreams is there twice, first on"),
        ("upstreams: []\nkeys_file: /k\n", ":1: key upstreams: Tuple should have at"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "door.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(path, FrontDoor)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        ("alice\n", ":1: must be a name and a key of 24 to 128 letters"),
        (f"alice {KEY}\nbob {KEY}\n", ":2: the key is that of alice already"),
        (f"alice {KEY[:23]}\n", ":1: must be a name"),
        (f'alice {KEY}";\n', ":1: must be a name"),
        (f"a$b {KEY}\n", ":1: must be a name"),
        (f"alice {KEY} extra\n", ":1: must be a name"),
    ],
)
def test_bad_keys(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o640)
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert message in str(error.value)
    assert KEY[:20] not in str(error.value)


def test_keys_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice {KEY}\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"every user may read it \(mode 0644\)"):
        read_keys(path)


def test_command(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {KEY}\n")
    keys.chmod(0o600)
    file, out = tmp_path / "door.yaml", tmp_path / "out"
    good = EXAMPLE.read_text().replace("/etc/lowbit/keys.txt", str(keys))
    good = good.replace("/tmp/lowbit-front-door", str(tmp_path / "run"))
    command = [sys.executable, "-m", "vllm_lowbit.deploy.front_door", file, "-o", out]

    def run(text: str) -> subprocess.CompletedProcess[str]:
        file.write_text(text)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )

    bad = run(good.replace("requests_per_minute", "requests_per_minutes"))
    assert bad.returncode == 1 and not out.exists()
    assert "key limits.requests_per_minutes does not exist" in bad.stderr
    assert "Traceback" not in bad.stderr
    done = run(good)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nginx -c {out}/nginx.conf\n"
