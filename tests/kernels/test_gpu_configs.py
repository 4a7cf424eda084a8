# SPDX-License-Identifier: Apache-2.0
"""Tables of launch configurations, and what a launch takes of a chip's memories."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.configs import LinearConfig, Row, Weight, choose, rows_of
from vllm_lowbit.kernels.gpu.limits import (
    SHARED_LIMITS,
    TENSOR_LIMITS,
    check_fits,
    check_weight,
    need,
)

CHIPS = (*configs.architectures(), configs.FALLBACK)
OPERATORS = {"linear_w4a4": (4, 8), "linear_wna16": (2, 3, 4, 8)}
GROUPS = (0, 32, 64, 128, 256)


def weights(operator: str) -> list[Weight]:
    forms = product(OPERATORS[operator], GROUPS, (False, True), (False, True))
    found = [Weight(*form) for form in forms]
    grouped = operator == "linear_w4a4"
    return [w for w in found if not w.token_groups or (grouped and w.group_size)]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_weight_and_number_of_tokens_has_a_tile_that_fits(
    chip: str, operator: str
) -> None:
    tables = configs.table(chip)
    chips = SHARED_LIMITS if chip == configs.FALLBACK else (chip,)
    for weight in weights(operator):
        for experts in (False, True):
            rows = tables[operator][weight.scheme]
            if experts:
                rows = configs.rows_for_experts(chip, operator, weight.scheme)
            taken = rows_of(rows, weight)
            assert taken[-1].max_m is None
            limits = [row.max_m for row in taken[:-1]]
            assert all(a < b for a, b in pairwise(limits) if a and b), (weight, limits)
            for arch, row in product(chips, taken):
                check_fits(arch, operator, weight, row.config)


def test_the_first_row_for_a_weight_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, last = (
        LinearConfig(16 * i, 16, 4, 2, True) for i in (1, 2, 3, 4)
    )
    rows = (
        Row(16, first),
        Row(64, second, bits=(2, 3), groups=(32,)),
        Row(None, third, zeros=True, token_groups=False),
        Row(None, last),
    )
    found = {"linear_wna16": {"group": rows, "channel": rows}}
    monkeypatch.setattr(configs, "table", lambda arch: found)

    def chosen(m: int, weight: Weight, experts: int = 0) -> LinearConfig:
        return choose("any", "linear_wna16", weight, m, experts)

    assert chosen(16, Weight(3, 32, True)) == first
    assert chosen(17, Weight(3, 32, True)) == second
    assert chosen(65, Weight(3, 32, True)) == third
    assert chosen(65, Weight(3, 32, False)) == last
    assert chosen(17, Weight(4, 32, False)) == last
    assert chosen(17, Weight(3, 64, False)) == last
    assert chosen(17, Weight(3, 0, True)) == third
    assert chosen(17, Weight(3, 64, True, token_groups=True)) == last
    assert chosen(65, Weight(3, 32, True), experts=5) == first
    assert rows_of(rows, Weight(3, 32, True)) == rows[:3]
    assert rows_of(rows, Weight(4, 64, False)) == (rows[0], rows[3])


def test_a_row_that_no_number_of_tokens_takes() -> None:
    config = LinearConfig(16, 16, 4, 2, True)
    rows = (Row(64, config, bits=(3,)), Row(64, config), Row(None, config))
    assert rows_of(rows, Weight(3, 0, False)) == (rows[0], rows[2])
    assert rows_of(rows, Weight(4, 0, False)) == rows[1:]


def test_rows_are_written_as_they_were_read() -> None:
    for chip in CHIPS:
        for schemes in configs.table(chip).values():
            for row in (row for rows in schemes.values() for row in rows):
                assert configs._row(configs.entry(row)) == row


# Bytes that Triton 3.9 takes, of the compile report; the pipeline's are exact there.
@pytest.mark.parametrize(
    ("arch", "operator", "weight", "config", "taken"),
    [
        ("sm_86", "linear_wna16", Weight(3, 0, False), (128, 128, 8, 3), 155648),
        ("sm_86", "linear_wna16", Weight(8, 0, False), (128, 128, 8, 3), 49152),
        ("sm_120", "linear_w4a4", Weight(4, 0, False), (128, 128, 8, 3), 49152),
        ("gfx942", "linear_wna16", Weight(8, 0, True), (128, 128, 8, 2), 24576),
    ],
)
def test_bytes_of_shared_memory(
    arch: str,
    operator: str,
    weight: Weight,
    config: tuple[int, int, int, int],
    taken: int,
) -> None:
    launch = LinearConfig(*config, swap=arch != "gfx942")
    found = need(arch, operator, weight, launch).shared
    assert found == max(taken, 2 * launch.block_m * launch.block_n)


def test_scales_of_tokens_take_shared_memory() -> None:
    """A scale and a zero point of four bytes for each token and group of a turn."""
    launch = LinearConfig(64, 64, 4, 3, False)
    for group, groups in ((32, 2), (128, 1)):
        one, own = (
            need("sm_80", "linear_w4a4", Weight(4, group, True, tokens), launch).shared
            for tokens in (False, True)
        )
        assert own - one == 2 * 64 * groups * 8
    huge = replace(launch, block_m=1024)
    with pytest.raises(ValueError, match="groups of 128 of weights and tokens and"):
        check_fits("sm_80", "linear_w4a4", Weight(4, 128, False, True), huge)


def test_columns_of_tensor_memory() -> None:
    """Sums of each group of a turn are apart: Triton takes 576 columns of these."""
    wide, narrow = (LinearConfig(m, 128, 8, 3, True) for m in (128, 64))
    for arch, (bits, group) in product(TENSOR_LIMITS, ((3, 64), (2, 32))):
        weight = Weight(bits, group, False)
        assert need(arch, "linear_wna16", weight, wide).tensor > TENSOR_LIMITS[arch]
        check_fits(arch, "linear_wna16", weight, narrow)
        with pytest.raises(ValueError, match=f"columns of tensor memory, {arch} has"):
            check_fits(arch, "linear_wna16", weight, wide)


def test_weights_that_a_table_has_no_tile_for() -> None:
    for operator in OPERATORS:
        for weight in weights(operator):
            for arch in SHARED_LIMITS:
                check_weight(arch, operator, weight)
    wide = Weight(4, 1024, False)
    with pytest.raises(ValueError, match="groups of 1024 and .* sm_86 has 101376"):
        check_weight("sm_86", "linear_wna16", wide)


def test_other_chips_are_left_to_triton() -> None:
    huge = LinearConfig(1024, 1024, 8, 9, True)
    check_fits("sm_75", "linear_w4a4", Weight(4, 0, False), huge)
    with pytest.raises(ValueError, match="one scale a channel and LinearConfig"):
        check_fits("sm_80", "linear_w4a4", Weight(4, 0, False), huge)
