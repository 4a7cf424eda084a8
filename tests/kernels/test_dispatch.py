# SPDX-License-Identifier: Apache-2.0
"""The dispatch table: complete, truthful, and plain about what it refuses."""

import importlib
import importlib.util
from pathlib import Path

import pytest

from vllm_lowbit import kernels
from vllm_lowbit.kernels import dispatch
from vllm_lowbit.kernels.dispatch import OPERATORS, TABLE, Row, select
from vllm_lowbit.kernels.implementations import IMPLEMENTATIONS, implementation
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS
from vllm_lowbit.kernels.packing import PACKABLE_BITS

# What kernels share, and the operator of two rows on a packed weight.
WITHOUT_ROW = {"cpu", "gpu", "linear_packed"}


def test_every_operator_folder_has_a_row() -> None:
    root = Path(str(kernels.__file__)).parent
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert set(OPERATORS) == folders - WITHOUT_ROW


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.operator}-{row.backend}")
def test_row_has_an_implementation(row: Row) -> None:
    """``generic`` may be the reference itself; any other backend has its module."""
    names = [row.backend] + ["reference"] * (row.backend == "generic")
    folder = row.operator
    if (folder, row.backend) == ("hadamard", "triton"):
        # A transform alone is the kernel of both without the codes.
        folder = "hadamard_quantize"
    paths = [f"vllm_lowbit.kernels.{folder}.{name}" for name in names]
    found = [path for path in paths if importlib.util.find_spec(path)]
    assert found, f"none of {paths} exists"
    other = {
        ("hadamard", "cpu"): "transform",
        ("hadamard", "triton"): "transform",
        ("linear_experts", "triton"): "linear_experts_w4a4",
    }
    name = other.get((row.operator, row.backend), row.operator)
    module = importlib.import_module(found[0])
    assert callable(getattr(module, name))
    assert callable(IMPLEMENTATIONS[row.operator, row.backend])


def test_nothing_else_is_implemented() -> None:
    assert set(IMPLEMENTATIONS) == {(row.operator, row.backend) for row in TABLE}
    for operator in OPERATORS:
        chosen = IMPLEMENTATIONS[operator, select(operator, "cpu").backend]
        assert implementation(operator) is chosen


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_kernels_come_first(operator: str) -> None:
    backends = [row.backend for row in TABLE if row.operator == operator]
    assert backends[-1] == "generic"
    others = ([], ["cpu"], ["triton"], ["cpu", "triton"], ["cpu", "blas"])
    assert backends[:-1] in others


@pytest.mark.parametrize(
    "operator",
    [
        "hadamard",
        "hadamard_quantize",
        "linear_w4a4",
        "linear_wna16",
        "linear_experts",
        "kv4_store",
        "rope_kv4_store",
        "kv4_attention",
    ],
)
def test_triton_runs_on_gpus_where_it_is_installed(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert select(operator, "cuda").backend == "triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse = dispatch._triton(lambda case: None)
    assert refuse({}) == "triton is not installed"


@pytest.mark.parametrize("operator", OPERATORS)
def test_cpu_always_has_a_backend(operator: str) -> None:
    row = select(operator, "cpu")
    assert row.operator == operator and "cpu" in row.devices


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gpu_always_has_a_backend(operator: str) -> None:
    backends = {"linear_tiled": "blas", "quantize_weight": "generic"}
    assert select(operator, "cuda").backend == backends.get(operator, "triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_device_without_a_backend(operator: str) -> None:
    with pytest.raises(ValueError) as error:
        select(operator, "xpu")
    assert f"no backend runs {operator} on xpu" in str(error.value)
    for row in (row for row in TABLE if row.operator == operator):
        reason = f"{row.backend}: runs on {', '.join(row.devices)}, not on xpu"
        assert reason in str(error.value)


def test_unknown_operator() -> None:
    with pytest.raises(ValueError) as error:
        select("conv2d", "cpu")
    assert "no backend runs conv2d on cpu: unknown operator, known:" in str(error.value)
    assert all(operator in str(error.value) for operator in OPERATORS)


@pytest.mark.parametrize("operator", ["linear_w4a4", "linear_wna16"])
@pytest.mark.parametrize("bits", range(1, 17))
def test_weight_widths(operator: str, bits: int) -> None:
    if bits in PACKABLE_BITS:
        assert select(operator, "cpu", weight_bits=bits).operator == operator
    else:
        message = rf"weight_bits must be one of \(2, 3, 4, 6, 8\), got {bits}"
        with pytest.raises(ValueError, match=message):
            select(operator, "cpu", weight_bits=bits)


@pytest.mark.parametrize("operator", ["linear_w4a4", "hadamard_quantize"])
@pytest.mark.parametrize("bits", [0, 1, 2, 4, 8, 9, 16])
def test_activation_widths(operator: str, bits: int) -> None:
    if 2 <= bits <= 8:
        assert select(operator, "cpu", activation_bits=bits).operator == operator
    else:
        message = f"activation_bits must be 2 to 8, got {bits}"
        with pytest.raises(ValueError, match=message):
            select(operator, "cpu", activation_bits=bits)


@pytest.mark.parametrize("operator", ["kv4_store", "kv4_attention"])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 0, 32, 72, 112, 192, 512])
def test_head_sizes(operator: str, head_dim: int) -> None:
    if head_dim in HEAD_DIMS:
        assert select(operator, "cpu", head_dim=head_dim).operator == operator
    else:
        message = rf"head_dim must be one of \(64, .*\), got {head_dim}"
        with pytest.raises(ValueError, match=message):
            select(operator, "cpu", head_dim=head_dim)


def test_first_row_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_wide(case: dispatch.Case) -> str | None:
        return None if case["width"] > 4 else f"width {case['width']} is too small"

    rows = (
        Row("op", "card", ("cuda",), lambda case: None),
        Row("op", "fast", ("cpu",), only_wide),
        Row("other", "any", ("cpu",), lambda case: None),
        Row("op", "slow", ("cpu", "cuda"), only_wide),
    )
    monkeypatch.setattr(dispatch, "TABLE", rows)
    assert select("op", "cuda", width=1).backend == "card"
    assert select("op", "cpu", width=5).backend == "fast"
    with pytest.raises(ValueError) as error:
        select("op", "cpu", width=3)
    assert str(error.value) == (
        "no backend runs op on cpu: card: runs on cuda, not on cpu; "
        "fast: width 3 is too small; slow: width 3 is too small"
    )
    monkeypatch.setattr(dispatch, "TABLE", (rows[3], *rows[:3]))
    assert select("op", "cpu", width=5).backend == "slow"
