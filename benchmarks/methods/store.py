# SPDX-License-Identifier: Apache-2.0
"""methods.json: what is known of every cell, and never half a file."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_lowbit.calibrate.files import replace_text

from .cells import Cell

Record = dict[str, Any]


class Store:
    """The contents of methods.json.

    Attributes:
        path: of the file.
        environments: machine and versions; a record has the index of its own.
        cells: record of each cell that was run, by its key.
        stale: of those that would be measured otherwise now; they stay in the file
            until they are measured again, and are not reported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environments: list[dict[str, str]] = []
        self.cells: dict[str, Record] = {}
        self.stale: dict[str, Record] = {}
        self._lock = threading.Lock()
        if path.is_file():
            data = json.loads(path.read_text())
            self.environments, self.cells = data["environments"], data["cells"]

    def done(self, cell: Cell, fingerprint: str) -> bool:
        """Whether a cell was measured as it would be now, without an error."""
        record = self.cells.get(cell.key, {})
        return "error" not in record and record.get("fingerprint") == fingerprint

    def set_aside(self, fingerprints: Mapping[str, str]) -> None:
        """Take what was measured otherwise than it would be now for ``stale``: of
        another recipe, model or text, or of a recipe that cannot be used any more.

        Args:
            fingerprints: of every cell that can be measured, by key.
        """
        for key in list(self.cells):
            if self.cells[key].get("fingerprint") != fingerprints.get(key):
                self.stale[key] = self.cells.pop(key)

    def result(self, key: str) -> Record | None:
        """What a cell measured, None when it was not, or failed."""
        record = self.cells.get(key)
        return None if record is None or "error" in record else record

    def errors(self) -> dict[str, str]:
        """Last line of every cell that failed."""
        return {
            key: record["error"].strip().rpartition("\n")[2]
            for key, record in self.cells.items()
            if "error" in record
        }

    def write(self, cell: Cell, record: Record) -> None:
        """Keep a record of ``run.measure``, and write the file."""
        where = record["environment"]
        with self._lock:
            if where not in self.environments:
                self.environments.append(where)
            index = self.environments.index(where)
            self.cells[cell.key] = {**record, "environment": index}
            self.stale.pop(cell.key, None)
            cells = {**self.cells, **self.stale}
            data = {"environments": self.environments, "cells": cells}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(data, indent=1) + "\n")
