# SPDX-License-Identifier: Apache-2.0
"""The integer grids: the one definition of rounding, scales and codes.

Calibration, the references and every backend follow this file.

* What has a scale of its own is a row: a token's input, an output channel's weights,
  or a group of neighbouring elements in one (``group_size``).
* Rounding is to nearest, ties to even.
* A scale is computed in float32, rounded to the type it is stored in, and only
  then used: ``inverse = 1 / scale`` (one IEEE division), ``code =
  round(x * inverse)``. Multiplication, addition of the zero point and rounding
  are separate IEEE operations (no fused multiply-add).
* Symmetric codes lie in ``[-(2^(b-1)-1), 2^(b-1)-1]``; ``full_range`` admits
  ``-2^(b-1)`` for imported checkpoints. Affine codes are ``u - 2^(b-1)`` with
  ``u`` in ``[0, 2^b-1]``, so that both kinds fit int8; the integer zero point is
  shifted alike and ``x = scale * (code - zero_point)`` holds for both.
* A range always includes zero (affine), so the zero point is a code.
* Degenerate rows: all zero (or every magnitude below ``2^-100``) gives scale 1
  and the codes of zero; a constant row ``c`` gives scale ``|c|`` and is exact.
* A row with an Inf or NaN gets scale NaN and codes 0: it stays visible in the
  output instead of turning into a plausible number.

KV cache entries (``kv_*``) are unsigned codes in [0, 15] with an fp16 scale and an
fp16 zero that need not be an integer, ``x = scale * (u - zero)``. Their scale is
clamped to ``[2^-24, 65504]`` (larger finite values are clipped) and is at least
``max|x| / 1024``, which keeps ``|zero|`` within what fp16 resolves to half a code. The
zero is a multiple of 1/64 in ``[-1024, 1024]``, so that ``u - zero`` is an integer of
17 bits over 64 and sums of it can be exact.
"""

from dataclasses import dataclass

import torch

TINY = 2.0**-100
KV_BITS = 4
KV_LEVELS = 2**KV_BITS - 1
KV_SCALE_MIN = 2.0**-24
KV_SCALE_MAX = 65504.0
KV_MAX_ZERO = 1024.0
KV_ZERO_STEPS = 64


@dataclass(frozen=True)
class IntGrid:
    """A grid of at most 8 bits whose codes are held in int8.

    Args:
        bits: code width, 2 to 8.
        symmetric: codes around zero; otherwise affine with an integer zero point.
        full_range: symmetric only, also use the code ``-2^(bits-1)``.
        clip_ratio: fraction of a row's range that is kept; what lies beyond becomes
            the outermost code.
        group_size: elements of a row where :meth:`rows` cuts an input into groups;
            None where all of an input is one row.

    Raises:
        ValueError: for a width outside 2..8, full_range on an affine grid, a
            clip_ratio outside (0, 1], or a group_size below 1.
    """

    bits: int
    symmetric: bool = True
    full_range: bool = False
    clip_ratio: float = 1.0
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.full_range and not self.symmetric:
            raise ValueError("full_range applies to symmetric grids only")
        if not 0 < self.clip_ratio <= 1:
            raise ValueError(
                f"clip_ratio must be above 0 and at most 1, got {self.clip_ratio}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @property
    def code_min(self) -> int:
        low = -(1 << (self.bits - 1))
        return low + 1 if self.symmetric and not self.full_range else low

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def offset(self) -> int:
        """What is added to a code to get the unsigned field that is packed."""
        return 1 << (self.bits - 1)

    @property
    def max_difference(self) -> int:
        """Largest ``|code - zero_point|``: bounds integer accumulators."""
        if self.symmetric:
            return max(-self.code_min, self.code_max)
        return self.code_max - self.code_min

    def groups(self, n: int) -> int:
        """Number of rows in an input of n elements.

        Raises:
            ValueError: when they are no whole groups.
        """
        if self.group_size is None:
            return 1
        groups, rest = divmod(n, self.group_size)
        if rest or not groups:
            raise ValueError(f"group_size {self.group_size} does not divide {n}")
        return groups

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs ``[..., n]`` as their rows, ``[..., groups, n / groups]``.

        Raises:
            ValueError: as :meth:`groups`.
        """
        return x.unflatten(-1, (self.groups(x.shape[-1]), -1))

    def parameters(
        self, x: torch.Tensor, clip_ratio: torch.Tensor | float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every row.

        Args:
            x: ``[..., n]``, any float dtype; a row is the last dimension.
            clip_ratio: fraction of the range that is kept, a float or
                ``[..., 1]``; None takes the grid's.

        Returns:
            scale float32 ``[..., 1]`` and zero_point int32 ``[..., 1]``.
        """
        clip_ratio = self.clip_ratio if clip_ratio is None else clip_ratio
        low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
        peak = torch.maximum(high, -low)
        if self.symmetric:
            scale = peak * clip_ratio / self.code_max
        else:
            low_, high_ = low.clamp(max=0.0), high.clamp(min=0.0)
            levels = self.code_max - self.code_min
            # Halves, so that the difference of two large values does not overflow.
            scale = (high_ * 0.5 - low_ * 0.5) * clip_ratio / (levels * 0.5)
        scale = _settle(scale, low, high, peak)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        if not self.symmetric:
            steps = torch.round(low_ * clip_ratio * (1.0 / scale)).nan_to_num()
            zero_point = self.code_min - steps.to(torch.int32)
        return scale, zero_point

    def encode(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        """Codes (int8, shape of x) on this grid; non-finite rows become 0."""
        steps = torch.round(x.float() * (1.0 / scale)) + zero_point
        codes = steps.clamp_(self.code_min, self.code_max)
        return codes.nan_to_num_(0.0).to(torch.int8)

    def quantize(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes ``[..., n]`` of inputs, scale and zero point ``[..., groups]``.

        Raises:
            ValueError: as :meth:`groups`.
        """
        rows = self.rows(x)
        scale, zero_point = self.parameters(rows)
        codes = self.encode(rows, scale, zero_point).flatten(-2)
        return codes, scale.squeeze(-1), zero_point.squeeze(-1)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """``scale * (code - zero_point)`` of rows, in float32."""
    return (codes.to(torch.int32) - zero_point).float() * scale


def _settle(
    scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, peak: torch.Tensor
) -> torch.Tensor:
    """Replace the scale of constant, all-zero and non-finite rows."""
    scale = torch.where(low == high, peak, scale)
    scale = torch.where(peak < TINY, 1.0, scale)
    return torch.where(torch.isfinite(scale), scale, torch.nan)


def kv_parameters(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 scale and zero of KV rows.

    Args:
        x: ``[..., head_dim]``, any float dtype.

    Returns:
        scale and zero, float16, ``[..., 1]``.
    """
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    peak = torch.maximum(high, -low)
    # Halves, so that the difference of two large values does not overflow.
    spread = (high * 0.5 - low * 0.5) / (KV_LEVELS * 0.5)
    scale = torch.maximum(spread, peak / KV_MAX_ZERO)
    scale = _settle(scale, low, high, peak)
    scale = scale.clamp(KV_SCALE_MIN, KV_SCALE_MAX).half()
    zero = -low * (1.0 / scale.float())
    zero = torch.where(peak < TINY, 0.0, zero.clamp(-KV_MAX_ZERO, KV_MAX_ZERO))
    zero = torch.round(zero * KV_ZERO_STEPS) / KV_ZERO_STEPS
    # One pattern for 0 and one for NaN: backends are compared byte by byte.
    zero = torch.where(zero.isnan(), torch.nan, zero + 0.0)
    return scale, zero.half()


def kv_encode(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Unsigned codes in [0, 15] as uint8, with the rounded scale and zero."""
    steps = x.float() * (1.0 / scale.float()) + zero.float()
    codes = torch.round(steps).clamp_(0, KV_LEVELS)
    return codes.nan_to_num_(0.0).to(torch.uint8)


def kv_decode(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """``scale * (u - zero)`` in float64, which holds it exactly."""
    return (codes.double() - zero.double()) * scale.double()
