# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit env``."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .. import __version__

if TYPE_CHECKING:
    from ..kernels.gpu.configs import Row


def env() -> None:
    """Print versions, the device, and which backend each operator takes here."""
    import torch

    from ..kernels import dispatch
    from ..plugin import SUPPORTED_VLLM, check_vllm_version, installed_vllm

    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"vllm-lowbit {__version__}, Python {platform.python_version()}")
    for name in ("torch", "triton", "transformers", "compressed-tensors"):
        console.print(f"{name} {_version(name)}")
    try:
        vllm = installed_vllm()
        check_vllm_version(vllm)
        console.print(f"vllm {vllm} (supported: {SUPPORTED_VLLM})")
    except ValueError as error:
        console.print(f"vllm: {error}", style="red")
    console.print(f"device {device}: {_device_name(device)}")
    console.print(f"CPU kernels {_cpu_kernels()}")

    table = Table("operator", "backend", "here", title="Backends")
    for operator in dispatch.OPERATORS:
        for row in (r for r in dispatch.TABLE if r.operator == operator):
            reason = row.reason_against(device, {})
            table.add_row(operator, row.backend, "out: " + reason if reason else "yes")
    console.print(table)
    _configurations(console, device)


def _configurations(console: Console, device: str) -> None:
    """How the Triton linears are launched on this GPU, or which GPUs are tabled."""
    from ..kernels.gpu import configs

    if device != "cuda":
        names = ", ".join(configs.architectures())
        console.print(f"GPU configurations for {names}; any other GPU: fallback")
        return
    import torch

    from ..kernels.gpu.target import architecture

    console.print(_configuration_table(architecture(torch.device(device))))


def _configuration_table(arch: str) -> Table:
    from ..kernels.gpu import configs

    source = arch if arch in configs.architectures() else "fallback"
    table = Table(
        *("operator", "scales", "weights", "tokens", "products", "tile", "warps"),
        *("stages", "swap", "split K"),
        title=f"GPU configurations for {arch} ({source})",
        caption="e4m3 products are of 4-bit codes; wider ones take int8",
    )
    for operator, schemes in configs.table(arch).items():
        for scheme, rows in schemes.items():
            for row in rows:
                c = row.config
                tokens = "any" if row.max_m is None else f"up to {row.max_m}"
                integer = "e4m3" if c.e4m3 else "int8"
                products = integer if operator.endswith("w4a4") else "16-bit float"
                tile = f"{c.block_m} x {c.block_n}"
                cells = c.warps, c.stages, c.swap, c.split_k
                what = operator, scheme, _weights(row), tokens, products, tile
                table.add_row(*what, *map(str, cells))
    return table


def _weights(row: "Row") -> str:
    """What a row is for, of its scales."""
    parts = []
    if row.bits:
        parts.append(f"{', '.join(map(str, row.bits))} bits")
    if row.groups:
        parts.append(f"groups of {', '.join(map(str, row.groups))}")
    if row.zeros is not None:
        parts.append("with zero points" if row.zeros else "symmetric")
    return "; ".join(parts) or "any"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _cpu_kernels() -> str:
    """Instruction set of the compiled kernels, or why they do not run."""
    from ..kernels.cpu import library

    if reason := library.missing():
        return f"none: {reason}"
    try:
        return f"{library.default_isa()}, here: {', '.join(library.isas())}"
    except ValueError as error:
        return f"none: {error}"


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.processor() or platform.machine()}, {capability}"
