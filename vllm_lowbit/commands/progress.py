# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import Progress


class Update(Protocol):
    """Shows the amount done, the total, and what is being done."""

    def __call__(self, done: int, total: int, what: str = ...) -> None: ...


@contextmanager
def progress_bar(description: str) -> Iterator[Update]:
    """Show a bar with the time left while the block runs; nothing without a terminal.

    Yields:
        What to call with the progress.
    """
    console = Console(stderr=True)
    if not console.is_terminal:  # where rich would leave an empty line
        yield lambda done, total, what=description: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int, what: str = description) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield update
