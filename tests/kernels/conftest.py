# SPDX-License-Identifier: Apache-2.0
"""What the operator tests share: bitwise comparison, row independence, paged caches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.kv4_store.generic import kv4_store

ROW_COUNTS = (1, 2, 3, 16, 17, 64, 255, 256, 257)
UNUSED_PAGE = 1 << 30

Tensors = tuple[torch.Tensor, ...]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``isa`` runs for every instruction set there is."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", () if library.missing() else library.isas())


@pytest.fixture
def garbage_in_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaNs and odd integers: what is not written will show."""
    empty = torch.empty

    def garbage(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        value = torch.nan if out.is_floating_point() else 157
        return out.fill_(value - 256 if out.dtype == torch.int8 else value)

    monkeypatch.setattr(torch, "empty", garbage)


@pytest.fixture(autouse=True)
def _threads_and_seed() -> Iterator[None]:
    # One thread unless a test asks for two: small operators only wait for a second.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type activations come in."""
    return request.param


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    a, b = (t.contiguous().view(torch.uint8) for t in (actual, expected))
    if not torch.equal(a, b):
        differ = (a != b).nonzero()
        pytest.fail(f"{len(differ)} bytes differ, the first at {differ[0].tolist()}")


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Equality of type, shape and every bit, NaNs included."""
    return _assert_same_bits


@pytest.fixture(scope="session")
def assert_rows_independent() -> Callable[..., None]:
    """Check that a row's result does not depend on the rows around it.

    Call with an operator from per-row tensors to per-row tensors, and inputs of 257
    rows. Every count of ROW_COUNTS, a window in the middle and a permutation must
    give the rows of the whole batch, bit for bit, with one thread and with two; the
    same rows with both, unless ``across_threads`` is False.
    """

    def check(
        operator: Callable[..., torch.Tensor | Tensors],
        *inputs: torch.Tensor,
        across_threads: bool = True,
    ) -> None:
        def run(rows: slice | torch.Tensor) -> Tensors:
            result = operator(*(t[rows] for t in inputs))
            return result if isinstance(result, tuple) else (result,)

        total = max(ROW_COUNTS)
        assert all(len(t) == total for t in inputs)
        whole = run(slice(None))
        shuffled = torch.randperm(total)
        choices = {
            1: [slice(0, count) for count in ROW_COUNTS] + [slice(5, 22), shuffled],
            2: [slice(0, 17), slice(2, total), slice(None)],
        }
        for threads, parts in choices.items():
            torch.set_num_threads(threads)
            if not across_threads:
                whole = run(slice(None))
            for rows in parts:
                for actual, expected in zip(run(rows), whole, strict=True):
                    _assert_same_bits(actual, expected[rows])

    return check


@dataclass(frozen=True)
class KVBatch:
    """Sequences in a paged cache of which every unused byte is 0xFF (fp16 NaN).

    Attributes:
        query: rows of all sequences, ``[tokens, num_heads, head_dim]``.
        cache: packed pages, as ``kv4_attention`` takes them.
        block_table: int32 ``[num_seqs, max_blocks]``; entries beyond a sequence's
            pages do not exist in the cache.
        query_lens: rows of each sequence.
        seq_lens: cached tokens of each.
        keys: ``[seq_len, num_kv_heads, head_dim]`` of each, before rotation.
        values: likewise.
        rotate: whether keys are stored rotated.
    """

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    rotate: bool

    def attend(
        self,
        attention: Callable[..., torch.Tensor],
        *,
        window: int | None = None,
        cap: float | None = None,
        scale: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run an implementation of ``kv4_attention`` on the batch."""
        starts = torch.tensor((0, *self.query_lens)).cumsum(0).int()
        return attention(
            self.query,
            self.cache,
            self.block_table,
            starts,
            torch.tensor(self.seq_lens, dtype=torch.int32),
            self.query.shape[-1] ** -0.5 if scale is None else scale,
            window,
            cap,
            sinks,
            self.rotate,
        )

    def rows(self, index: int) -> slice:
        """Rows of the query that sequence ``index`` owns."""
        start = sum(self.query_lens[:index])
        return slice(start, start + self.query_lens[index])

    def pick(self, index: int, start: int, stop: int) -> "KVBatch":
        """The batch of one sequence, cut to the query rows ``start`` to ``stop``.

        What comes after the last row is not part of the sequence then.
        """
        hidden = self.query_lens[index] - stop
        return replace(
            self,
            query=self.query[self.rows(index)][start:stop],
            block_table=self.block_table[index : index + 1],
            query_lens=(stop - start,),
            seq_lens=(self.seq_lens[index] - hidden,),
        )

    def reordered(self, order: Sequence[int]) -> "KVBatch":
        """The same sequences in another order."""
        return replace(
            self,
            query=torch.cat([self.query[self.rows(i)] for i in order]),
            block_table=self.block_table[list(order)],
            query_lens=tuple(self.query_lens[i] for i in order),
            seq_lens=tuple(self.seq_lens[i] for i in order),
        )


def _kv_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int] | None = None,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    rotate: bool = True,
    seed: int = 0,
) -> KVBatch:
    random = torch.Generator().manual_seed(seed)
    query_lens = tuple(seq_lens if query_lens is None else query_lens)
    pages = [-(-length // block_size) for length in seq_lens]
    total = sum(pages) + 3
    cache = torch.full(
        (total, num_kv_heads, block_size, head_dim + 8), 255, dtype=torch.uint8
    )
    order = torch.randperm(total, generator=random).int()
    table = torch.full((len(pages), max(pages) + 1), UNUSED_PAGE, dtype=torch.int32)
    used, keys, values = 0, [], []
    for i, length in enumerate(seq_lens):
        table[i, : pages[i]] = order[used : used + pages[i]]
        used += pages[i]
        position = torch.arange(length)
        slots = table[i, position // block_size].long() * block_size
        shape = (2, length, num_kv_heads, head_dim)
        key, value = torch.randn(shape, generator=random).to(dtype)
        kv4_store(key, value, cache, slots + position % block_size, rotate)
        keys.append(key)
        values.append(value)
    query = torch.randn(sum(query_lens), num_heads, head_dim, generator=random)
    return KVBatch(
        query.to(dtype),
        cache,
        table,
        query_lens,
        tuple(seq_lens),
        tuple(keys),
        tuple(values),
        rotate,
    )


@pytest.fixture(scope="session")
def kv_batch() -> Callable[..., KVBatch]:
    """Factory of random sequences in a poisoned cache with shuffled pages."""
    return _kv_batch


@pytest.fixture
def shared_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the operators that GPUs have a kernel of their own for."""
    bf16, fp16 = torch.bfloat16, torch.float16
    x, input_scale, weight = torch.randn(5, 128), torch.rand(128) + 0.5, torch.rand(128)
    key = torch.randn(3, 2, 64)
    cache = torch.full((2, 2, 16, 72), 255, dtype=torch.uint8)
    batch = _kv_batch([40, 7], [2, 7])
    starts, lengths = torch.tensor([0, 2, 9]), torch.tensor(batch.seq_lens)
    placed = (torch.tensor([0, 8, 3]),)
    paged = batch.cache, batch.block_table, starts, lengths
    plain = (batch.query, *paged, 0.125, None, None, None, True)
    options = 0.125, 8, 20.0, torch.randn(4), False
    return {
        "hadamard": [
            (x, None, 128, 1),
            (x.to(bf16), input_scale, 1, 1),
            (x.to(fp16), None, 4, 32),
            (torch.randn(5, 24), None, 12, 2, True),
        ],
        "hadamard_quantize": [
            (x, input_scale, 128, 1, 4, False),
            (x.to(bf16), None, 1, 1, 8, True),
            (x.to(fp16), None, 4, 32, 4, True),
            (x.to(bf16), input_scale, 128, 1, 4, False, 0.9, 32),
            (x, None, 1, 1, 8, True, 1.0, 64),
        ],
        "rms_norm_hadamard_quantize": [
            (x.to(bf16), weight, 1e-5, None, 128, 1, 4, False),
            (x, weight.to(bf16), 1e-5, input_scale, 1, 1, 8, True),
            (x.to(bf16), weight, 1e-5, None, 128, 1, 4, False, 1.0, 64),
        ],
        "swiglu_hadamard_quantize": [
            (x.to(bf16), None, 64, 1, 4, False),
            (x, input_scale[:64], 4, 16, 8, True),
            (x.to(bf16), None, 1, 1, 4, False, 1.0, 32),
        ],
        "kv4_store": [
            (key, key, cache, torch.tensor([3, -1, 30]), True),
            (key.to(bf16), key.to(bf16), cache, torch.tensor([0, 1, 2]), False),
        ],
        "rope_kv4_store": [
            (torch.randn(3, 4, 64), key + 1, key, *placed, torch.randn(9, 64))
            + (cache, torch.tensor([3, -1, 30]), True),
            (torch.randn(3, 4, 64).to(bf16), key.to(bf16), key.to(bf16), *placed)
            + (torch.randn(9, 64), cache, torch.tensor([0, 1]), False),
        ],
        "kv4_attention": [plain, (batch.query.to(bf16), *paged, *options)],
        "kv4_attention_out": [
            (*plain, batch.query + 1, None),
            (batch.query, *paged, *options, batch.query + 1, torch.ones(99)),
        ],
    }
