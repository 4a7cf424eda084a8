# SPDX-License-Identifier: Apache-2.0
"""Folding transforms into plain weights: the function stays, only its form changes."""

from dataclasses import replace

import pytest
import torch

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.errors import CheckpointError
from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.hadamard.generic import hadamard
from vllm_lowbit.kernels.hadamard_quantize.reference import transform
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
from vllm_lowbit.load_time import (
    LinearRotations,
    check_finite,
    equalizing_scale,
    fold,
    fold_bias,
    quantize_linear,
    rotations_of,
)
from vllm_lowbit.module_names import FUSED, ROLES
from vllm_lowbit.placement import flag_only_rotations
from vllm_lowbit.schema import Rotation, Rotations, Weights, scheme_from_name
from vllm_lowbit.supported_models import LLAMA


def online(order: int, stride: int = 1, scaled: bool = False) -> Rotation:
    return Rotation(apply="online", order=order, block=order * stride, scaled=scaled)


def folded(order: int) -> Rotation:
    return Rotation(apply="folded", order=order, block=order)


def at_run_time(
    x: torch.Tensor, rotation: Rotation | None, input_scale: torch.Tensor | None
) -> torch.Tensor:
    """What the server does to the input of a linear."""
    order, stride = (1, 1) if rotation is None else (rotation.order, rotation.stride)
    return transform(x, input_scale, order, stride)


def assert_same_function(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 1e-5


def uneven(n: int, k: int) -> torch.Tensor:
    """A weight whose columns differ in size by powers of ten."""
    return torch.randn(n, k) * torch.logspace(-2, 2, k)[torch.randperm(k)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Sizes whose cores are not symmetric, so that H and its transpose differ; a head
# size apart from hidden / heads; grouped, multi-query and multi-head attention.
BIASES = frozenset(name for names in LLAMA.bias_keys.values() for name in names)
SHAPES = {
    "gqa": ModelShape(224, 576, 1, 8, 2, 80, 64, False, BIASES),
    "mqa": ModelShape(112, 448, 1, 6, 1, 64, 64, False, BIASES),
    "mha": ModelShape(320, 160, 1, 4, 4, 96, 64, False, BIASES),
    "one head": ModelShape(64, 96, 1, 1, 1, 128, 64, False, BIASES),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def load_time_rotations(shape: ModelShape) -> Rotations:
    return flag_only_rotations(shape, scheme_from_name("w4a4kv4"), "config.json")


class TestRotationsOf:
    everything = Rotations(
        attn_input=online(64),
        k=online(16),
        v=folded(16),
        o_input=online(4, 16),
        mlp_input=online(128),
        down_input=online(256),
    )

    @pytest.mark.parametrize(
        ("role", "folded_input", "online_input", "output"),
        [
            ("q_proj", None, "attn_input", None),
            ("k_proj", None, "attn_input", None),
            ("v_proj", None, "attn_input", "v"),
            ("o_proj", "v", "o_input", None),
            ("gate_proj", None, "mlp_input", None),
            ("up_proj", None, "mlp_input", None),
            ("down_proj", None, "down_input", None),
        ],
    )
    def test_roles(
        self,
        role: str,
        folded_input: str | None,
        online_input: str | None,
        output: str | None,
    ) -> None:
        def pick(name: str | None) -> Rotation | None:
            return None if name is None else getattr(self.everything, name)

        assert rotations_of(self.everything, role) == LinearRotations(
            pick(folded_input), pick(online_input), pick(output)
        )
        assert rotations_of(Rotations(), role) == LinearRotations()

    def test_every_fused_part_has_a_role(self) -> None:
        assert len(set(ROLES)) == len(ROLES) == 7
        for parts in FUSED.values():
            inputs = {rotations_of(self.everything, p).online_input for p in parts}
            assert len(inputs) == 1, "fused linears share their input"

    @pytest.mark.parametrize("role", ["lm_head", "qkv_proj", ""])
    def test_unknown_role(self, role: str) -> None:
        with pytest.raises(ValueError, match=f"no linear has the role '{role}'"):
            rotations_of(self.everything, role)


class TestFold:
    @pytest.mark.parametrize("rotation", [online(28, 8), online(448), online(7 * 16)])
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_online_input(
        self, rotation: Rotation, scaled: bool, dtype: torch.dtype
    ) -> None:
        weight, x = uneven(40, 448).to(dtype), torch.randn(9, 448)
        input_scale = equalizing_scale(weight) if scaled else None
        done = fold(weight, LinearRotations(online_input=rotation), input_scale)
        assert done.dtype == torch.float32 and done.shape == weight.shape
        y = at_run_time(x, rotation, input_scale) @ done.t()
        assert_same_function(y, x.double() @ weight.double().t())
        # The inverse has to be H^T on this side.
        wrong = hadamard(
            weight.float(), rotation.order, rotation.stride, transpose=True
        )
        assert (wrong - fold(weight, LinearRotations(None, rotation), None)).norm() > 1

    def test_nothing_to_fold(self) -> None:
        weight = torch.randn(4, 12)
        assert torch.equal(fold(weight, LinearRotations(), None), weight)

    @every_shape
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("role", ["q_proj", "k_proj", "gate_proj", "down_proj"])
    def test_roles_of_a_model(self, shape: ModelShape, role: str, scaled: bool) -> None:
        around = rotations_of(load_time_rotations(shape), role)
        assert around.online_input is not None
        name = next(n for n in shape.tensors() if n.endswith(f"{role}.weight"))
        n, k = shape.tensors()[name]
        weight, x = uneven(n, k), torch.randn(5, k)
        input_scale = equalizing_scale(weight) if scaled else None
        y = at_run_time(x, around.online_input, input_scale)
        y = y @ fold(weight, around, input_scale).t()
        assert_same_function(y, x.double() @ weight.double().t())

    @every_shape
    @pytest.mark.parametrize("scaled", [False, True])
    def test_values_and_output_projection(
        self, shape: ModelShape, scaled: bool
    ) -> None:
        """The pair through attention: rotated values, mixed over tokens, undone."""
        rotations = load_time_rotations(shape)
        if rotations.o_input is not None and scaled:
            o_input = rotations.o_input.model_copy(update={"scaled": True})
            rotations = rotations.model_copy(update={"o_input": o_input})
        v_around, o_around = (rotations_of(rotations, r) for r in ("v_proj", "o_proj"))
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        v_weight = uneven(kv_heads * head_dim, shape.hidden_size)
        o_weight = uneven(shape.hidden_size, heads * head_dim)
        v_bias = torch.randn(kv_heads * head_dim)
        o_bias = torch.randn(shape.hidden_size)
        x, probabilities = torch.randn(6, shape.hidden_size), torch.rand(heads, 6, 6)

        def attended(values: torch.Tensor) -> torch.Tensor:
            v = values.unflatten(-1, (kv_heads, head_dim))
            v = v.repeat_interleave(heads // kv_heads, dim=1)
            return torch.einsum("hqt,thd->qhd", probabilities.to(v), v).flatten(1)

        plain = attended(x.double() @ v_weight.double().t() + v_bias.double())
        expected = plain @ o_weight.double().t() + o_bias.double()

        v_scale = equalizing_scale(v_weight) if scaled else None
        v = at_run_time(x, v_around.online_input, v_scale)
        v = v @ fold(v_weight, v_around, v_scale).t()
        v = v + fold_bias(v_bias, [len(v_bias)], [v_around])
        assert (v.norm() / (x @ v_weight.t() + v_bias).norm() - 1).abs() < 1e-4
        mixed = attended(v)
        assert (mixed.double() - plain).norm() > 0.1 * plain.norm(), "not rotated"
        first = replace(o_around, online_input=None)
        o_scale = equalizing_scale(fold(o_weight, first, None)) if scaled else None
        out = at_run_time(mixed, o_around.online_input, o_scale)
        out = out @ fold(o_weight, o_around, o_scale).t()
        out = out + fold_bias(o_bias, [len(o_bias)], [o_around])
        assert_same_function(out, expected)

    @every_shape
    def test_shards_see_the_same_transform(self, shape: ModelShape) -> None:
        """Any allowed tensor parallel size cuts between blocks, never through one."""
        rotations = load_time_rotations(shape)
        sizes = {
            "o_input": shape.num_heads * shape.head_dim,
            "down_input": shape.intermediate_size,
        }
        parallel = rotations.max_tensor_parallel_size
        for name, size in sizes.items():
            rotation = getattr(rotations, name)
            if rotation is None:
                continue
            x = torch.randn(3, size)
            whole = at_run_time(x, rotation, None)
            shards = [
                at_run_time(part, rotation, None) for part in x.chunk(parallel, -1)
            ]
            assert torch.equal(torch.cat(shards, dim=-1), whole)


class TestFoldBias:
    def test_only_rotated_parts_change(self) -> None:
        bias = torch.randn(96 + 48 + 48)
        parts = [
            LinearRotations(),
            LinearRotations(),
            LinearRotations(None, None, folded(24)),
        ]
        done = fold_bias(bias, [96, 48, 48], parts)
        assert torch.equal(done[:144], bias[:144])
        back = hadamard(done[144:], 24, transpose=True)
        torch.testing.assert_close(back, bias[144:], rtol=0, atol=1e-5)
        assert (done[144:] - bias[144:]).abs().max() > 0.1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_its_type(self, dtype: torch.dtype) -> None:
        bias = torch.randn(48).to(dtype)
        done = fold_bias(bias, [48], [LinearRotations(output=folded(24))])
        assert done.dtype == dtype
        assert torch.equal(done, hadamard(bias, 24).to(dtype))

    def test_parts_must_match(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            fold_bias(torch.ones(4), [2, 2], [LinearRotations()])


class TestEqualizingScale:
    def test_powers_of_two_of_mean_one(self) -> None:
        scale = equalizing_scale(uneven(32, 100))
        assert scale.dtype == torch.float32 and scale.shape == (100,)
        mantissa, _ = torch.frexp(scale)
        assert (mantissa == 0.5).all()
        assert torch.log2(scale).mean().abs() < 0.5
        assert scale.min() < 0.1 and scale.max() > 10

    def test_columns_come_to_one_magnitude(self) -> None:
        weight = uneven(64, 100)
        size = (weight / equalizing_scale(weight)).square().mean(0).sqrt()
        assert size.max() / size.min() <= 2 * (1 + 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_loses_no_bit(self, dtype: torch.dtype) -> None:
        weight, x = uneven(16, 60).to(dtype), torch.randn(3, 60).to(dtype)
        scale = equalizing_scale(weight)
        assert torch.equal(weight.float() / scale * scale, weight.float())
        assert torch.equal((x.float() * scale).to(dtype).float(), x.float() * scale)

    def test_zero_columns(self) -> None:
        weight = uneven(16, 60)
        weight[:, [3, 59]] = 0
        scale = equalizing_scale(weight)
        assert (scale[[3, 59]] == 1).all()
        live = torch.tensor([i for i in range(60) if i not in (3, 59)])
        assert torch.equal(scale[live], equalizing_scale(weight[:, live]))
        assert (equalizing_scale(torch.zeros(4, 8)) == 1).all()

    def test_is_bounded(self) -> None:
        weight = torch.ones(4, 9)
        weight[:, 0], weight[:, 1] = 1e15, 1e-15
        scale = equalizing_scale(weight)
        assert scale[0] == 2.0**16 and scale[1] == 2.0**-16
        assert (scale[2:] == 1).all()

    def test_only_the_proportions_count(self) -> None:
        weight = uneven(16, 60)
        assert torch.equal(equalizing_scale(weight * 64), equalizing_scale(weight))


class TestQuantizeLinear:
    sizes = (96, 48, 48)

    def parts(self, scaled: bool) -> list[LinearRotations]:
        rotations = Rotations(attn_input=online(64, scaled=scaled), v=folded(24))
        return [rotations_of(rotations, role) for role in FUSED["qkv_proj"]]

    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("group_size", [None, 64])
    def test_folds_each_part_and_quantizes(
        self, scaled: bool, symmetric: bool, group_size: int | None
    ) -> None:
        weight = uneven(192, 128).bfloat16()
        weights = Weights(bits=4, symmetric=symmetric, group_size=group_size)
        done = quantize_linear(weight, self.sizes, self.parts(scaled), weights)
        groups = 1 if group_size is None else 2
        assert done.codes.shape == (192, 128) and done.codes.dtype == torch.int8
        assert done.scale.shape == (192, groups)
        assert (done.zero_point is None) == symmetric
        # One scale for the shared input, of all rows together.
        expected_scale = equalizing_scale(weight) if scaled else None
        if expected_scale is None:
            assert done.input_scale is None
        else:
            assert done.input_scale is not None
            assert torch.equal(done.input_scale, expected_scale)
        grid, start = IntGrid(4, symmetric), 0
        for size, around in zip(self.sizes, self.parts(scaled), strict=True):
            rows = slice(start, start + size)
            part = fold(weight[rows], around, expected_scale)
            codes, scale, zero_point = quantize_weight(part, grid, group_size)
            assert torch.equal(done.codes[rows], codes)
            assert torch.equal(done.scale[rows], scale)
            if done.zero_point is not None:
                assert torch.equal(done.zero_point[rows], zero_point)
            start += size

    def test_scale_is_that_of_the_folded_columns(self) -> None:
        """The online transform sees the columns after the folded input's inverse."""
        weight = uneven(64, 96)
        around = LinearRotations(folded(24), online(4, 24, scaled=True))
        done = quantize_linear(weight, [64], [around], Weights(bits=4))
        assert done.input_scale is not None
        columns = fold(weight, LinearRotations(folded(24)), None)
        assert torch.equal(done.input_scale, equalizing_scale(columns))

    @pytest.mark.parametrize("bits", [4, 6, 8])
    def test_error_falls_with_the_width(self, bits: int) -> None:
        """End to end: the quantized linear is the plain one within its grid."""
        weight, x = uneven(40, 128), torch.randn(20, 128)
        rotation = online(128, scaled=True)
        parts = [LinearRotations(online_input=rotation)]
        done = quantize_linear(weight, [40], parts, Weights(bits=bits))
        zero = torch.zeros(40, 1, dtype=torch.int32)
        y = at_run_time(x, rotation, done.input_scale)
        y = y @ decode(done.codes, done.scale, zero).t()
        plain = x @ weight.t()
        error = (y - plain).norm() / plain.norm()
        # A step is at most 2 peak / (2^b - 2), and a Gaussian row peaks below 4.
        assert 1e-4 < error < 4 / (2**bits - 2) / 3**0.5
        if bits == 8:
            rotated = replace(done, input_scale=None)
            lost = at_run_time(x, rotation, rotated.input_scale)
            lost = lost @ decode(done.codes, done.scale, zero).t()
            assert (lost - plain).norm() > 0.5 * plain.norm()


class TestCheckFinite:
    def test_finite(self) -> None:
        check_finite(torch.full((3, 4), 3e38), "a.weight")
        check_finite(torch.empty(0), "a.weight")

    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_anywhere(self, bad: float, dtype: torch.dtype) -> None:
        """Also past the part that is looked at first."""
        tensor = torch.zeros((1 << 22) + 8, dtype=dtype)
        for index in (0, 1 << 22, -1):
            tensor[index] = bad
            with pytest.raises(CheckpointError, match=r"x\.weight holds a non-finite"):
                check_finite(tensor, "model.x.weight")
            tensor[index] = 0
