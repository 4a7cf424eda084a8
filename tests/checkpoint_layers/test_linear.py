# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a lowbit checkpoint inside vLLM: loading, shards, clip ratios."""

from typing import Any

import pytest
import torch

from vllm_lowbit.errors import CheckpointError, UnsupportedError
from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.schema import ClipRatios, scheme_from_name
from vllm_lowbit.supported_models import ARCHITECTURES

pytest.importorskip("vllm")
from .tensors import HIDDEN, INTERMEDIATE, cut, load, quantized, stacked

RATIOS = ClipRatios(
    attn_input=(0.875,), o_input=(0.5,), mlp_input=(0.75,), down_input=(0.625,)
)
CLIPPED = scheme_from_name("w4a4").with_clip_ratios(RATIOS)


class TestLinear:
    def gate_up(self, config: Any) -> Any:
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear

        return MergedColumnParallelLinear(
            HIDDEN,
            [INTERMEDIATE, INTERMEDIATE],
            bias=True,
            quant_config=config,
            prefix="model.layers.0.mlp.gate_up_proj",
            params_dtype=torch.float32,
        )

    def down(self, config: Any, inputs: int = INTERMEDIATE) -> Any:
        from vllm.model_executor.layers.linear import RowParallelLinear

        return RowParallelLinear(
            inputs,
            HIDDEN,
            bias=False,
            quant_config=config,
            prefix="model.layers.0.mlp.down_proj",
            params_dtype=torch.float32,
        )

    def qkv(self, config: Any) -> Any:
        from vllm.model_executor.layers.linear import QKVParallelLinear

        return QKVParallelLinear(
            HIDDEN,
            64,
            4,
            2,
            bias=False,
            quant_config=config,
            prefix="model.layers.0.self_attn.qkv_proj",
            params_dtype=torch.float32,
        )

    @pytest.fixture(params=[0, 1])
    def rank(self, request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
        """This process as one of two tensor parallel ranks."""
        self.parallel(monkeypatch, request.param, 2)
        return request.param

    @pytest.fixture
    def alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parallel(monkeypatch, 0, 1)

    def parallel(self, patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
        linear = "vllm.model_executor.layers.linear.get_tensor_model_parallel_"
        patch.setattr(f"{linear}rank", lambda: rank)
        patch.setattr(f"{linear}world_size", lambda: size)

    @pytest.mark.parametrize(
        "scheme", ["w4a4", "w2a16-g64", "w4a16-g32", "w3a16", "w4a4-g64-ag64"]
    )
    def test_whole(
        self, scheme: str, alone: None, quant: Any, assert_kept: Any
    ) -> None:
        config = quant(scheme)
        layer = self.gate_up(config)
        parts = [
            quantized(INTERMEDIATE, HIDDEN, config.scheme.weights) for _ in range(2)
        ]
        for part, tensors in enumerate(parts):
            load(layer, {**tensors, "bias": torch.full((INTERMEDIATE,), part)}, part)
        layer.quant_method.process_weights_after_loading(layer)
        names = [name for name, _ in layer.named_parameters()]
        assert [n for n in names if not n.startswith("weight")] == ["bias"]
        assert layer.input_scale is None
        assert_kept(layer, *stacked(parts))
        x = torch.randn(3, HIDDEN)
        out = layer.quant_method.apply(layer, x, layer.bias)
        assert out.shape == (3, 2 * INTERMEDIATE) and out.isfinite().all()

    @pytest.mark.parametrize("scheme", ["w4a4-g64-ag64", "w4a4-g128-ag128"])
    def test_shard_that_cuts_groups(self, scheme: str, rank: int, quant: Any) -> None:
        config = quant(scheme)
        size = config.scheme.activations.group_size
        with pytest.raises(UnsupportedError) as error:
            self.down(config)
        assert str(error.value) == (
            "linear model.layers.0.mlp.down_proj: a shard of 96 inputs is not a "
            f"multiple of group_size {size}"
        )

    def test_groups_of_the_input(self, rank: int, quant: Any) -> None:
        """A rank computes with its part of the token's groups, as the whole would."""
        config = quant("w4a8kv4-g32-ag32")
        layer = self.down(config)
        tensors = quantized(HIDDEN, INTERMEDIATE, config.scheme.weights)
        load(layer, tensors)
        method = layer.quant_method
        method.process_weights_after_loading(layer)
        grid = method.kernel.spec.activations
        assert grid == IntGrid(8, False, group_size=32)
        x = torch.randn(5, INTERMEDIATE) * torch.logspace(-2, 1, INTERMEDIATE)
        own = slice(rank * INTERMEDIATE // 2, (rank + 1) * INTERMEDIATE // 2)
        codes, scale, zero_point = IntGrid(8, False).quantize(x.view(-1, 32))
        a = decode(codes, scale, zero_point).view(x.shape)[:, own]
        parts = tensors["codes"].view(HIDDEN, -1, 32)
        zero = torch.zeros(1, dtype=torch.int32)
        weight = decode(parts, tensors["weight_scale"].unsqueeze(-1), zero).flatten(1)
        out = method.apply(layer, x[:, own].contiguous())
        torch.testing.assert_close(out, a @ weight[:, own].t(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("scheme", ["w4a4", "w2a16-g32", "w6a6", "w4a4-g32-ag32"])
    def test_shard_of_the_input(
        self, scheme: str, rank: int, quant: Any, assert_kept: Any
    ) -> None:
        """Words are cut with their codes; scales only where they have groups."""
        config = quant(scheme)
        layer = self.down(config)
        tensors = quantized(HIDDEN, INTERMEDIATE, config.scheme.weights)
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        assert_kept(layer, *stacked([cut(tensors, 1, rank)]))

    @pytest.mark.parametrize("scheme", ["w4a4", "w2a16-g64"])
    def test_shard_of_the_heads(
        self, scheme: str, rank: int, quant: Any, assert_kept: Any
    ) -> None:
        config = quant(scheme)
        layer, parts = self.qkv(config), []
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            tensors = quantized(heads * 64, HIDDEN, config.scheme.weights)
            load(layer, tensors, name)
            parts.append(cut(tensors, 0, rank))
        layer.quant_method.process_weights_after_loading(layer)
        assert_kept(layer, *stacked(parts))

    @pytest.mark.parametrize("scheme", ["w4a4", "w2a16-g64"])
    def test_shard_of_the_heads_where_files_stack_them(
        self, scheme: str, rank: int, quant: Any, assert_kept: Any
    ) -> None:
        """GPT-2's q, k and v, of each of which a rank has its half."""
        from vllm.model_executor.layers.linear import QKVParallelLinear

        config = quant(scheme)
        config._names = ARCHITECTURES["GPT2LMHeadModel"].names
        layer = QKVParallelLinear(
            HIDDEN,
            64,
            4,
            quant_config=config,
            prefix="transformer.h.0.attn.c_attn",
            params_dtype=torch.float32,
        )
        parts = [quantized(256, HIDDEN, config.scheme.weights) for _ in "qkv"]
        whole = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
        bias = torch.arange(768.0)
        load(layer, whole | {"bias": bias})
        layer.quant_method.process_weights_after_loading(layer)
        assert_kept(layer, *stacked([cut(part, 0, rank) for part in parts]))
        halves = [part.chunk(2)[rank] for part in bias.chunk(3)]
        assert torch.equal(layer.bias, torch.cat(halves))

    def test_shard_that_cuts_packed_words(self, rank: int, quant: Any) -> None:
        with pytest.raises(UnsupportedError) as error:
            self.down(quant("w3a16"), 160)
        assert str(error.value) == (
            "linear model.layers.0.mlp.down_proj: a shard of 80 inputs is not a "
            "multiple of the 32 codes of 3 bits packed together"
        )

    @pytest.mark.parametrize(
        ("scheme", "missing"),
        [
            ("w4a4", "weight_packed"),
            ("w4a4", "weight_scale"),
            ("w3a16", "weight_scale"),
        ],
    )
    def test_part_that_was_not_loaded(
        self, scheme: str, missing: str, alone: None, quant: Any
    ) -> None:
        config = quant(scheme)
        layer = self.gate_up(config)
        tensors = quantized(INTERMEDIATE, HIDDEN, config.scheme.weights)
        bias = {"bias": torch.zeros(INTERMEDIATE)}
        load(layer, {**tensors, **bias}, 0)
        del tensors[missing]
        load(layer, {**tensors, **bias}, 1)
        message = f"^tensor model.layers.0.mlp.up_proj.{missing} holds"
        with pytest.raises(CheckpointError, match=message):
            layer.quant_method.process_weights_after_loading(layer)

    def test_clip_ratio_is_that_of_the_input(self, alone: None, quant: Any) -> None:
        """Of its layer and place; what the layer computes follows it."""
        config = quant(CLIPPED)
        expected = {self.gate_up: 0.75, self.down: 0.625, self.qkv: 0.875}
        for make, ratio in expected.items():
            assert make(config).quant_method.kernel.spec.activations.clip_ratio == ratio
        layer = self.down(config)
        tensors = quantized(HIDDEN, INTERMEDIATE, config.scheme.weights)
        load(layer, tensors)
        method = layer.quant_method
        method.process_weights_after_loading(layer)
        x = torch.randn(5, INTERMEDIATE)
        out = method.apply(layer, x)
        grid = IntGrid(4, symmetric=False, clip_ratio=0.625)
        codes = stacked([tensors])
        weight = decode(codes[0], codes[1], torch.zeros(1, dtype=torch.int32))
        assert torch.allclose(out, decode(*grid.quantize(x)) @ weight.t(), atol=1e-4)

    def test_clip_ratios_of_experts(self, quant: Any) -> None:
        """All experts of a layer share those of their inputs."""
        config = quant(CLIPPED).resolved
        from vllm_lowbit.linear import LinearRole

        experts = "model.layers.0.mlp.experts"
        for name, ratio in (("gate_up_proj", 0.75), ("down_proj", 0.625)):
            grid = LinearRole(config, f"{experts}.{name}").activation_grid
            assert grid is not None and grid.clip_ratio == ratio

    @pytest.mark.parametrize("prefix", ["model.layers.1.mlp", "model.mlp"])
    def test_clip_ratio_of_no_layer(self, quant: Any, prefix: str) -> None:
        from vllm_lowbit.linear import LinearRole

        config = quant(CLIPPED).resolved
        with pytest.raises(UnsupportedError) as error:
            LinearRole(config, f"{prefix}.down_proj")
        assert str(error.value) == (
            f"linear {prefix}.down_proj is in none of the 1 layers of "
            "scheme.activations.clip_ratios.down_input"
        )

    def test_bias_that_is_not_finite(self, alone: None, quant: Any) -> None:
        config = quant("w4a4")
        layer = self.gate_up(config)
        layer.bias.data.zero_()[-1] = torch.inf
        with pytest.raises(CheckpointError, match="mlp.up_proj.bias holds a non-fini"):
            layer.quant_method.process_weights_after_loading(layer)
