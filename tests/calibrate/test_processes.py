# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own: results, failures, time limits, interrupts."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.calibrate import processes
from vllm_lowbit.calibrate.processes import (
    Ended,
    Processes,
    run_here,
    run_on_cluster,
)
from vllm_lowbit.errors import ConfigError

CORES = sorted(os.sched_getaffinity(0))
# Programs find the path of their result in sys.argv[-1].
WRITE = "import sys; open(sys.argv[-1], 'w').write({!r})"
# Says that it is there, and what interrupted it.
WAIT = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
try:
    time.sleep(120)
except KeyboardInterrupt:
    open(sys.argv[1] + ".saved", "w").write("state")
    raise
"""
# A driver that is killed, or interrupted, while its job waits.
DRIVER = """
import os, sys
from functools import partial
from pathlib import Path
from vllm_lowbit.calibrate import processes
def work(job, cores, running):
    return running.run(["-c", sys.argv[1], job], cores, Path(job + ".log"))
processes.run_here([sys.argv[2]], work, 1, lambda job, result: None)
"""


def program(code: str, job: Any, cores: list[int], running: Processes) -> Ended:
    return running.run(["-c", code, str(job)], cores, Path(os.devnull))


def until(holds: Callable[[], object]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("not within two minutes")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestOneProcess:
    def test_result_and_environment(self, tmp_path: Path) -> None:
        code = (
            "import json, os, sys; json.dump([os.environ['OMP_NUM_THREADS'], "
            "os.environ['A'], os.getcwd(), sorted(os.sched_getaffinity(0)), "
            "os.getpid() == os.getpgid(0)], open(sys.argv[-1], 'w')); print('said')"
        )
        log = tmp_path / "logs" / "x.log"
        variables = {"OMP_NUM_THREADS": "3", "A": "b"}
        ended = Processes().run(["-c", code], CORES[:1], log, None, tmp_path, variables)
        assert ended.result == ["3", "b", str(tmp_path), CORES[:1], True]
        assert (ended.code, ended.tail) == (0, "said\n")
        assert log.read_text() == "said\n"

    def test_threads_are_those_of_its_cores(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        code = "import os, sys; open(sys.argv[-1], 'w').write(os.environ['{}'])"
        words = ["-c", code.format("OMP_NUM_THREADS")]
        ended = Processes().run(words, CORES, tmp_path / "log")
        assert ended.result == len(CORES)

    @pytest.mark.parametrize(
        ("code", "exit_code", "tail"),
        [
            ("print('no result')", 0, "no result\n"),
            (WRITE.format("1") + "; sys.exit('the reason')", 1, "the reason\n"),
            ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ],
    )
    def test_failures(
        self, tmp_path: Path, code: str, exit_code: int, tail: str
    ) -> None:
        ended = Processes().run(["-c", code], CORES, tmp_path / "log")
        assert (ended.code, ended.result, ended.tail) == (exit_code, None, tail)

    def test_time_limit_and_what_it_started(self, tmp_path: Path) -> None:
        """Its own children end with it."""
        code = (
            "import subprocess, sys, time; print(subprocess.Popen([sys.executable, "
            "'-c', 'import time; time.sleep(120)']).pid, flush=True); time.sleep(120)"
        )
        ended = Processes().run(["-c", code], CORES, tmp_path / "log", timeout=5)
        assert ended.code is None
        until(lambda: not is_alive(int(ended.tail)))


class TestHere:
    def test_each_result_is_kept_and_failures_stop_nothing(self) -> None:
        kept: dict[int, Any] = {}
        code = (
            "import sys; n = 6 // int(sys.argv[1]); "
            "open(sys.argv[-1], 'w').write(str(n))"
        )
        work = partial(program, code)
        keep = lambda job, ended: kept.update({job: (ended.code, ended.result)})
        assert run_here([1, 0, 2], work, 2, keep) == 0
        assert kept == {1: (0, 6), 0: (1, None), 2: (0, 3)}

    def test_shares_of_the_cores(self) -> None:
        shares = []

        def work(job: int, cores: list[int], running: Processes) -> None:
            shares.append(cores)

        run_here(range(8), work, len(CORES), lambda job, result: None)
        assert all(len(share) == 1 for share in shares)
        run_here([0], work, 1, lambda job, result: None)
        assert shares[-1] == CORES
        run_here([0], work, len(CORES) + 1, lambda job, result: None)
        assert set(shares[-1]) <= set(CORES) and shares[-1]

    def test_an_error_of_keeping_ends_the_others(self, tmp_path: Path) -> None:
        """And is raised; nothing more is kept."""
        there = tmp_path / "waits"

        def work(job: str, cores: list[int], running: Processes) -> str:
            if job == "quick":
                until(there.exists)
                return job
            program(WAIT, there, cores, running)
            return job

        def keep(job: str, result: str) -> None:
            assert job == "quick"
            raise OSError("the disk is full")

        jobs = ["slow", "quick", "never"]
        with pytest.raises(OSError, match="the disk is full"):
            run_here(jobs, work, 2, keep)
        assert not is_alive(int(there.read_text()))
        assert (tmp_path / "waits.saved").exists()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_the_process_is_interrupted_with_its_driver(
        self, tmp_path: Path, number: signal.Signals
    ) -> None:
        there = tmp_path / "waits"
        words = [sys.executable, "-c", DRIVER, WAIT, str(there)]
        driver = subprocess.Popen(
            words,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        until(lambda: there.exists() and there.read_text())
        driver.send_signal(number)
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == -number
        until(lambda: not is_alive(int(there.read_text())))
        assert (tmp_path / "waits.saved").read_text() == "state"
        assert ("ending 1 under way" in said) is (number == signal.SIGINT)

    def test_one_that_does_not_listen_is_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
        there = tmp_path / "waits"
        deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAIT
        running = Processes()
        ended: list[Ended] = []
        thread = threading.Thread(
            target=lambda: ended.append(program(deaf, there, CORES, running))
        )
        thread.start()
        until(lambda: there.exists() and there.read_text())
        running.end()
        thread.join(60)
        assert [e.code for e in ended] == [-signal.SIGKILL]
        assert not (tmp_path / "waits.saved").exists()


class TestCluster:
    def test_jobs_that_fail_where_they_run(self) -> None:
        """An error of the work, and nodes that die with it: the others go on."""
        pytest.importorskip("ray", reason="extra `ray`")

        def work(job: str, cores: list[int], running: Processes) -> str:
            if job == "raises":
                raise OSError("the disk is full")
            if job == "dies":
                os._exit(1)
            return f"done {job}"

        kept: dict[str, str] = {}
        keep = lambda job, result: kept.update({job: result})
        lost = lambda job, reason: f"lost: {reason}"
        jobs = ["raises", "dies", "well"]
        assert run_on_cluster(jobs, work, "local", keep, lost) == 0
        assert kept["well"] == "done well"
        assert kept["raises"] == "lost: OSError: the disk is full"
        assert kept["dies"].startswith("lost: ") and "die" in kept["dies"]
        assert "\n" not in kept["dies"]

    def test_no_cluster(self) -> None:
        pytest.importorskip("ray", reason="extra `ray`")
        keep = lambda job, result: None
        with pytest.raises(ConfigError, match="--ray auto: Could not find any running"):
            run_on_cluster([1], program, "auto", keep, lambda job, reason: reason)
