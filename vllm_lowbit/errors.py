# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on. All are ValueErrors, so vLLM reports and exits."""


class LowbitError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(LowbitError):
    """A key or value of a configuration is unknown, impossible or inconsistent."""


class CheckpointError(LowbitError):
    """A checkpoint's files do not hold what they should; names file and tensor."""


class UnsupportedError(LowbitError):
    """A model, layer, option or device this version cannot run truthfully."""


class CalibrationError(LowbitError):
    """Calibration met numbers it cannot go on with; names the layer."""


class OutputError(LowbitError):
    """A result cannot be written; nothing that looks like one is left."""
