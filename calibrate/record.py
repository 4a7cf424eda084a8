# SPDX-License-Identifier: Apache-2.0
"""calibration.json: what training and quantization measured on the way.

    {"curves": {"refine": [[step, loss], ...], ...},
     "layers": {"model.layers.0.mlp.up_proj": {"output_error": ..., ...}, ...}}

Nothing in it depends on time or machine, so the same run gives the same bytes.
"""

import json
import math

from ..errors import CalibrationError

CALIBRATION = "calibration.json"
# Fewer digits than last bits of a sum of another order would change.
_DIGITS = 5


class CalibrationRecord:
    """Collects curves and numbers of layers; :meth:`text` is the file."""

    def __init__(self) -> None:
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._layers: dict[str, dict[str, float]] = {}

    def point(self, curve: str, step: int, loss: float) -> None:
        """Add a point to a training curve.

        Args:
            curve: such as ``refine`` or ``omniquant.model.layers.0``.
            step: optimiser steps done.
            loss: at that step.

        Raises:
            CalibrationError: naming curve and step when the loss is not finite.
        """
        if not math.isfinite(loss):
            raise CalibrationError(
                f"{curve}: the loss at step {step} is {loss}; lower its rates, "
                "or look for values in the model that overflow"
            )
        self._curves.setdefault(curve, []).append((step, _short(loss)))

    def layer(self, name: str, **values: float) -> None:
        """Set numbers of a linear, replacing those of the same names."""
        known = self._layers.setdefault(name, {})
        known |= {key: _short(value) for key, value in values.items()}

    def text(self) -> str:
        """The file: JSON with sorted keys."""
        content = {"curves": self._curves, "layers": self._layers}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
