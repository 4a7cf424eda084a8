# SPDX-License-Identifier: Apache-2.0
"""Writing K and V into packed pages: which bytes, where, and no others."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.grid import kv_encode, kv_parameters
from vllm_lowbit.kernels.hadamard.matrices import matrix
from vllm_lowbit.kernels.kv4_store import cpu, generic, layout, reference
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS

Store = Callable[..., None]
compiled = pytest.param(
    cpu.kv4_store,
    marks=pytest.mark.skipif(library.missing() is not None, reason="not compiled"),
)
every = pytest.mark.parametrize(
    "store",
    [reference.kv4_store, generic.kv4_store, compiled],
    ids=["reference", "generic", "cpu"],
)


def poisoned(
    blocks: int, heads: int, block_size: int, head_dim: int, fill: int = 255
) -> torch.Tensor:
    shape = (blocks, heads, block_size, head_dim + 8)
    return torch.full(shape, fill, dtype=torch.uint8)


def random_kv(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    kv = torch.randn(2, tokens, heads, head_dim) + torch.randn(2, tokens, heads, 1)
    key, value = kv.to(dtype)
    return key, value


def shuffled_slots(tokens: int, blocks: int, block_size: int) -> torch.Tensor:
    return torch.randperm(blocks * block_size)[:tokens]


def expected_bytes(row: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """Packed codes, scale bytes and zero bytes of one head of one token."""
    scale, zero = kv_parameters(row.float())
    codes = kv_encode(row.float(), scale, zero).tolist()
    half = len(codes) // 2
    packed = [codes[j] | codes[j + half] << 4 for j in range(half)]
    little = [list(np.float16(t.item()).tobytes()) for t in (scale, zero)]
    return packed, little[0], little[1]


@every
def test_byte_positions(store: Store) -> None:
    """Offsets worked out by hand from the layout table, block size 16, head size 64."""
    key, value = random_kv(1, 2, 64)
    cache = poisoned(3, 2, 16, 64)
    store(key, value, cache, torch.tensor([1 * 16 + 5]), False)
    for head in range(2):
        k_codes, k_scale, k_zero = expected_bytes(key[0, head])
        v_codes, v_scale, v_zero = expected_bytes(value[0, head])
        # The page of block 1: 16 tokens x 72 bytes, two heads a block.
        page = cache.flatten()[(1 * 2 + head) * 1152 :][:1152].tolist()
        assert page[160:192] == k_codes  # 5 x 32
        assert page[672:704] == v_codes  # 512 + 5 x 32
        assert page[1034:1036] == k_scale  # 1024 + 5 x 2
        assert page[1066:1068] == k_zero  # 1056 + 5 x 2
        assert page[1098:1100] == v_scale  # 1088 + 5 x 2
        assert page[1130:1132] == v_zero  # 1120 + 5 x 2
    assert (cache != 255).sum() <= 2 * (32 + 32 + 8)


@every
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_layout_formula(store: Store, head_dim: int, block_size: int) -> None:
    """Every token of two pages, at the offsets the layout table gives."""
    tokens = 2 * block_size
    key, value = random_kv(tokens, 1, head_dim)
    cache = poisoned(2, 1, block_size, head_dim)
    store(key, value, cache, torch.arange(tokens), False)
    half, pages = head_dim // 2, cache.flatten(1).tolist()
    for token in (0, 1, block_size - 1, block_size, tokens - 1):
        page, at = pages[token // block_size], token % block_size
        for codes_at, parameters_at, rows in ((0, 0, key), (1, 2, value)):
            codes, scale, zero = expected_bytes(rows[token, 0])
            start = block_size * half * codes_at + at * half
            assert page[start : start + half] == codes
            start = block_size * (head_dim + 2 * parameters_at) + 2 * at
            assert page[start : start + 2] == scale
            start += 2 * block_size
            assert page[start : start + 2] == zero


def test_all_nibble_pairs() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack((low.flatten(), high.flatten()), dim=-1).to(torch.uint8)
    packed = layout.pack_nibbles(codes)
    assert packed.flatten().tolist() == [
        lo + 16 * hi for lo in range(16) for hi in range(16)
    ]
    assert torch.equal(layout.unpack_nibbles(packed), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_nibbles_pair_the_halves(head_dim: int) -> None:
    codes = torch.randint(0, 16, (3, head_dim), dtype=torch.uint8)
    packed = layout.pack_nibbles(codes)
    for j in range(head_dim // 2):
        assert torch.equal(packed[:, j] & 15, codes[:, j])
        assert torch.equal(packed[:, j] >> 4, codes[:, j + head_dim // 2])
    assert torch.equal(layout.unpack_nibbles(packed), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rotate", [True, False])
def test_generic_is_the_reference_to_the_byte(
    head_dim: int, rotate: bool, dtype: torch.dtype
) -> None:
    key, value = random_kv(41, 3, head_dim, dtype)
    slots = shuffled_slots(41, 5, 16)
    slots[7], slots[40] = -1, -1
    caches = poisoned(5, 3, 16, head_dim), poisoned(5, 3, 16, head_dim)
    reference.kv4_store(key, value, caches[0], slots, rotate)
    generic.kv4_store(key, value, caches[1], slots, rotate)
    assert torch.equal(*caches)
    assert (caches[0] != 255).any()


@every
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_only_keys_are_rotated(store: Store, head_dim: int) -> None:
    """By H, not its transpose: sizes 80 and 96 have cores that are not symmetric."""
    key, value = random_kv(9, 2, head_dim)
    plain, rotated = (poisoned(1, 2, 16, head_dim) for _ in range(2))
    store(key, value, plain, torch.arange(9), False)
    store(key, value, rotated, torch.arange(9), True)
    a, b = layout.planes(plain), layout.planes(rotated)
    assert torch.equal(a.v_codes, b.v_codes)
    assert torch.equal(a.v_scale[..., :9], b.v_scale[..., :9])
    h = matrix(head_dim).double() / head_dim**0.5
    expected = key.double() @ h.t()
    codes = layout.unpack_nibbles(b.k_codes[0, :, :9]).transpose(0, 1).double()
    scale = b.k_scale[0, :, :9].t().unsqueeze(-1).double()
    zero = b.k_zero[0, :, :9].t().unsqueeze(-1).double()
    error = ((codes - zero) * scale - expected).abs()
    assert (error <= 0.51 * scale).all()


@every
@pytest.mark.parametrize("fill", [255, 0, 165])
def test_nothing_else_is_written(store: Store, fill: int) -> None:
    """Bytes of other slots, other blocks and padding tokens keep their value."""
    key, value = random_kv(12, 2, 64)
    key[3], value[7] = torch.nan, torch.nan  # Padding tokens hold anything.
    slots = shuffled_slots(12, 4, 16)
    slots[3], slots[7] = -1, -1
    cache = poisoned(4, 2, 16, 64, fill)
    store(key, value, cache, slots, True)
    touched = torch.zeros(4, 16, dtype=torch.bool)
    live = slots[slots >= 0]
    touched[live // 16, live % 16] = True
    planes = layout.planes(cache)
    for plane in planes:
        untouched = plane.transpose(1, 2)[~touched].contiguous().view(torch.uint8)
        assert untouched.numel() and (untouched == fill).all()
    for plane in planes[2:]:
        assert torch.isfinite(plane.transpose(1, 2)[touched]).all()


@every
@pytest.mark.parametrize("slots", [[-1] * 5, []], ids=["padding", "no tokens"])
def test_nothing_to_store(store: Store, slots: list[int]) -> None:
    key, value = random_kv(len(slots), 2, 80)
    cache = poisoned(2, 2, 16, 80)
    store(key, value, cache, torch.tensor(slots, dtype=torch.int64), True)
    assert (cache == 255).all()


@every
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_slot_types_and_last_slot(store: Store, index_dtype: torch.dtype) -> None:
    key, value = random_kv(2, 1, 64)
    caches = poisoned(3, 1, 16, 64), poisoned(3, 1, 16, 64)
    store(key, value, caches[0], torch.tensor([47, 0], dtype=index_dtype), True)
    store(key.flip(0), value.flip(0), caches[1], torch.tensor([0, 47]), True)
    assert torch.equal(*caches)


@every
def test_a_slot_can_be_written_again(store: Store) -> None:
    first, second = random_kv(8, 2, 64), random_kv(8, 2, 64)
    slots = shuffled_slots(8, 2, 16)
    twice, once = poisoned(2, 2, 16, 64), poisoned(2, 2, 16, 64)
    store(*first, twice, slots, True)
    store(*second, twice, slots, True)
    store(*second, once, slots, True)
    assert torch.equal(twice, once)


@every
@pytest.mark.parametrize("form", ["one of two", "heads first", "cut", "gaps"])
def test_strides_between_pages(store: Store, form: str) -> None:
    """Pages are contiguous, blocks and heads anywhere; the memory between is kept."""
    blocks, heads, block_size, width = 4, 2, 16, 72
    page = (block_size, width)
    base, cache = {
        "one of two": lambda b: (b, b[:, 1]),
        "heads first": lambda b: (b, b.transpose(0, 1)),
        "cut": lambda b: (b, b[1:5]),
        "gaps": lambda b: (b, b[..., : block_size * width].unflatten(-1, page)),
    }[form](
        torch.full(
            {
                "one of two": (blocks, 2, heads, *page),
                "heads first": (heads, blocks, *page),
                "cut": (blocks + 2, heads, *page),
                "gaps": (blocks, heads, block_size * width + 64),
            }[form],
            255,
            dtype=torch.uint8,
        )
    )
    assert cache.shape == (blocks, heads, *page)
    before = base.clone()
    key, value = random_kv(20, heads, 64)
    slots = shuffled_slots(20, blocks, block_size)
    plain = poisoned(blocks, heads, block_size, 64)
    store(key, value, plain, slots, True)
    store(key, value, cache, slots, True)
    assert torch.equal(cache, plain)
    cache.copy_(torch.full_like(cache, 255))
    assert torch.equal(base, before)


@every
def test_inputs_may_be_slices_of_a_fused_projection(store: Store) -> None:
    fused = torch.randn(10, 6, 80)
    slots = shuffled_slots(10, 1, 16)
    caches = poisoned(1, 2, 16, 80), poisoned(1, 2, 16, 80)
    store(fused[:, 2:4], fused[:, 4:], caches[0], slots, True)
    key, value = fused[:, 2:4].contiguous(), fused[:, 4:].contiguous()
    store(key, value, caches[1], slots, True)
    assert torch.equal(*caches)


@every
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_stays_with_its_token_and_head(store: Store, bad: float) -> None:
    key, value = random_kv(4, 2, 64)
    clean, dirty = poisoned(1, 2, 16, 64), poisoned(1, 2, 16, 64)
    store(key, value, clean, torch.arange(4), True)
    key[2, 1, 9] = bad
    store(key, value, dirty, torch.arange(4), True)
    a, b = layout.planes(clean), layout.planes(dirty)
    assert torch.isnan(b.k_scale[0, 1, 2]) and torch.isnan(b.k_zero[0, 1, 2])
    differs = (clean != dirty).sum()
    b.k_scale[0, 1, 2], b.k_zero[0, 1, 2] = a.k_scale[0, 1, 2], a.k_zero[0, 1, 2]
    b.k_codes[0, 1, 2] = a.k_codes[0, 1, 2]
    assert differs > 0 and torch.equal(clean, dirty)


@pytest.mark.parametrize("store", [generic.kv4_store, compiled], ids=["generic", "cpu"])
def test_rows_are_independent(
    store: Store, dtype: torch.dtype, assert_rows_independent: Callable[..., None]
) -> None:
    """A token's bytes do not depend on what is stored with it."""
    key, value = random_kv(257, 2, 96, dtype)

    def stored(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache = poisoned(257, 2, 1, 96)
        store(key, value, cache, torch.arange(len(key)), True)
        return cache[: len(key)]

    assert_rows_independent(stored, key, value)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bytes_per_token(head_dim: int) -> None:
    assert layout.bytes_per_token(head_dim) == head_dim // 2 * 2 + 4 * 2
    layout.check_head_dim(head_dim)


def test_planes_cover_every_byte_once() -> None:
    cache = poisoned(3, 2, 16, 80)
    planes = layout.planes(cache)
    assert sum(p.numel() * p.element_size() for p in planes) == cache.numel()
    for value, plane in enumerate(planes):
        # Assigning through a byte view keeps fp16 patterns as they are.
        plane.view(torch.uint8).fill_(value)
    counts = torch.bincount(cache.flatten().long()).tolist()
    assert counts == [p.numel() * p.element_size() for p in planes]


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(2, 1, 16, 72), "must be uint8 .*, got torch.float32"),
        (torch.zeros(2, 16, 72, dtype=torch.uint8), r"uint8 \[blocks.*\[2, 16, 72\]"),
        (
            torch.zeros(2, 1, 72, 16, dtype=torch.uint8).transpose(2, 3),
            "pages must be contiguous, got strides",
        ),
        (
            torch.zeros(2, 1, 16, 144, dtype=torch.uint8)[..., :72],
            "pages must be contiguous, got strides",
        ),
        (
            torch.zeros(2, 1, 16, 80, dtype=torch.uint8),
            r"head_dim must be one of \(64, 80, 96, 128, 256\), got 72",
        ),
    ],
    ids=["dtype", "rank", "transposed", "cut", "head_dim"],
)
@every
def test_caches_that_are_refused(
    store: Store, cache: torch.Tensor, message: str
) -> None:
    key = torch.randn(1, 1, 64)
    with pytest.raises(ValueError, match=message):
        store(key, key, cache, torch.tensor([0]), True)
