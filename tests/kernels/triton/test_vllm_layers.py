# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers where the default device is a GPU: kernels in the interpreter.

Tensors stay on the CPU, where the operators run what they run on a GPU.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.packing import pack
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
from vllm_lowbit.schema import LowbitConfig, Weights, scheme_from_name

HIDDEN, INTERMEDIATE, EXPERTS = 128, 256, 3
ROTATIONS = {
    "mlp_input": {"apply": "online", "order": 128, "block": 128},
    "down_input": {"apply": "online", "order": 64, "block": 64},
    "max_tensor_parallel_size": 2,
}
SCHEMES = ("w4a4", "w4a16-g64", "w8a8")
CUDA = torch.device("cuda", 0)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def engine(engine_config: Any) -> Iterator[None]:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(engine_config(dtype="float32")):
        yield


@pytest.fixture
def gpu(
    engine: None, gpu_ops: None, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """Methods are built for a GPU."""
    monkeypatch.setattr(torch, "get_default_device", lambda: CUDA)
    return monkeypatch


def config_of(scheme: str, vocab_bits: int = 16) -> Any:
    """Of a checkpoint."""
    from vllm_lowbit.config import LowbitQuantizationConfig

    chosen = scheme_from_name(scheme, vocab_bits=vocab_bits)
    data = {"scheme": chosen.model_dump(), "rotations": ROTATIONS}
    config = LowbitQuantizationConfig(stored=LowbitConfig.parse(data, "test"))
    config._resolved, config._checked_engine = config.stored, True
    config._verification = SimpleNamespace(finish=lambda: None)
    return config


def stored(n: int, k: int, weights: Weights) -> Tensors:
    """Tensors of a random matrix as a checkpoint has them."""
    grid = IntGrid(weights.bits, weights.symmetric)
    codes, scale, _ = quantize_weight(torch.randn(n, k), grid, weights.group_size)
    return {"weight_packed": pack(codes, weights.bits), "weight_scale": scale}


def parallel(patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    linear = "vllm.model_executor.layers.linear.get_tensor_model_parallel_"
    patch.setattr(f"{linear}rank", lambda: rank)
    patch.setattr(f"{linear}world_size", lambda: size)


def linear_of(config: Any, role: str, tensors: list[Tensors]) -> Any:
    """A linear of vLLM, loaded by its own loaders: this rank's part."""
    from vllm.model_executor.layers import linear

    settings: dict[str, Any] = {
        "bias": False,
        "quant_config": config,
        "prefix": f"model.layers.0.mlp.{role}",
        "params_dtype": torch.float32,
    }
    if role == "down_proj":
        layer = linear.RowParallelLinear(INTERMEDIATE, HIDDEN, **settings)
    else:
        sizes = [INTERMEDIATE, INTERMEDIATE]
        layer = linear.MergedColumnParallelLinear(HIDDEN, sizes, **settings)
    for name, parameter in layer.named_parameters():
        for index, part in enumerate(tensors):
            shard = () if role == "down_proj" else (index,)
            parameter.weight_loader(parameter, part[name], *shard)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.backend == "triton"
    return layer


def halves_alike(tokens: int, width: int) -> torch.Tensor:
    """Tokens whose halves have one grid: that of each shard is that of the whole."""
    return torch.randn(tokens, width // 2).repeat(1, 2)


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> bool:
    return bool((actual - expected).abs().max() <= bound * expected.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_a_linear_add_up_to_the_whole(
    scheme: str, gpu: pytest.MonkeyPatch
) -> None:
    """Columns to the bit; rows but for the rounding of two float32 sums.

    A weight-only linear rounds its input to 16 bits, the same in either rank.
    """
    config = config_of(scheme)
    weights = config.scheme.weights
    up = [stored(INTERMEDIATE, HIDDEN, weights) for _ in range(2)]
    down = [stored(HIDDEN, INTERMEDIATE, weights)]
    x, h = torch.randn(5, HIDDEN).half(), halves_alike(5, INTERMEDIATE).half()
    found = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        parallel(gpu, rank, size)
        gate_up = linear_of(config, "gate_up_proj", up)
        columns = gate_up.quant_method.apply(gate_up, x)
        down_proj = linear_of(config, "down_proj", down)
        mine = h.chunk(size, 1)[rank].contiguous()
        kernel = down_proj.quant_method.kernel
        rows = kernel.multiply(down_proj, mine, None, None, torch.float32)
        found.append((columns, rows))
    (whole, total), (first, one), (second, two) = found
    parts = [
        torch.cat((a, b), 1)
        for a, b in zip(first.chunk(2, 1), second.chunk(2, 1), strict=True)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert close(one + two, total)
    assert not close(one, total, 0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_linear(scheme: str, gpu: pytest.MonkeyPatch) -> None:
    """In one graph, for any number of tokens; as the backend of any device."""
    parallel(gpu, 0, 1)
    config = config_of(scheme)
    tensors = [stored(HIDDEN, INTERMEDIATE, config.scheme.weights)]
    layer = linear_of(config, "down_proj", tensors)
    run = lambda x: layer.quant_method.apply(layer, x + 1)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 7):
        x = torch.randn(tokens, INTERMEDIATE).half()
        assert torch.equal(compiled(x), run(x))


def moe(rank: int, size: int) -> Any:
    """What our method reads of vLLM's description of a layer."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return SimpleNamespace(
        activation=MoEActivation.SILU,
        has_bias=False,
        moe_parallel_config=SimpleNamespace(
            use_ep=False,
            enable_eplb=False,
            dp_size=1,
            is_sequence_parallel=False,
            tp_rank=rank,
            tp_size=size,
        ),
    )


def experts_of(config: Any, tensors: dict[str, list[Tensors]], *shard: int) -> Any:
    """A layer of experts with the part of this rank, and its method."""
    from vllm_lowbit.experts_checkpoint import CheckpointExpertsMethod

    rank, size = shard
    prefix, layer = "model.layers.0.mlp.experts", torch.nn.Module()
    method = CheckpointExpertsMethod(
        config.resolved, moe(rank, size), prefix, config._verification
    )
    inner = INTERMEDIATE // size
    method.create_weights(layer, EXPERTS, HIDDEN, inner, torch.float32)
    for shard_id, experts in tensors.items():
        name = "w2" if shard_id == "w2" else "w13"
        for expert, parts in enumerate(experts):
            for kind, tensor in parts.items():
                parameter = layer.get_parameter(f"{name}_{kind}")
                parameter.weight_loader(parameter, tensor, kind, shard_id, expert)
    method.process_weights_after_loading(layer)
    assert method.gate_up.backend == method.down.backend == "triton"
    return layer, method


def expert_tensors(weights: Weights) -> dict[str, list[Tensors]]:
    """Gate and up have one input, so halves alike come out of halves alike."""
    tensors: dict[str, list[Tensors]] = {"w1": [], "w3": [], "w2": []}
    for _ in range(EXPERTS):
        for name in ("w1", "w3"):
            half = stored(INTERMEDIATE // 2, HIDDEN, weights)
            tensors[name].append({k: t.repeat(2, 1) for k, t in half.items()})
        tensors["w2"].append(stored(HIDDEN, INTERMEDIATE, weights))
    return tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_experts_add_up_to_the_whole(
    scheme: str, gpu: pytest.MonkeyPatch
) -> None:
    """And in one graph they are what they are without one."""
    config = config_of(scheme)
    tensors = expert_tensors(config.scheme.weights)
    x, ids = torch.randn(6, HIDDEN).half(), torch.rand(6, EXPERTS).topk(2)[1]
    chosen = torch.rand(6, 2), ids

    def run(layer: Any, method: Any, x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, *chosen, None, None).float()

    whole = run(*experts_of(config, tensors, 0, 1), x)
    layer, method = experts_of(config, tensors, 0, 2)
    ranks = [run(layer, method, x), run(*experts_of(config, tensors, 1, 2), x)]
    # What a rank gives is rounded to float16.
    assert close(ranks[0] + ranks[1], whole, 2e-3)
    assert not close(ranks[0], whole, 0.1)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer, method, x), ranks[0])


def test_a_linear_is_selected_by_the_device_it_is_built_on(engine: None) -> None:
    """As vLLM builds models: inside of the device, weights on none."""
    from vllm_lowbit.experts_load_time import LoadTimeExpertsMethod
    from vllm_lowbit.linear_load_time import LoadTimeLinearMethod

    resolved = config_of("w4a4").resolved
    linear = LoadTimeLinearMethod(resolved, "model.layers.0.mlp.down_proj")
    experts = LoadTimeExpertsMethod(resolved, moe(0, 1), "model.layers.0.mlp.experts")
    for device, backend in ((CUDA, "triton"), (torch.device("cpu"), "cpu")):
        with device:
            layer, loader = torch.nn.Module(), {"weight_loader": lambda *a: None}
            layer.bias, layer.weight_loader = None, loader["weight_loader"]
            sizes = [HIDDEN], INTERMEDIATE, HIDDEN, torch.float16
            linear.create_weights(layer, INTERMEDIATE, *sizes, **loader)
            assert (linear.backend, layer.weight.device.type) == (backend, "meta")
            layer, sizes = torch.nn.Module(), (EXPERTS, HIDDEN, INTERMEDIATE)
            experts.create_weights(layer, *sizes, torch.float16, **loader)
            found = {role.backend for role in (experts.gate_up, experts.down)}
            assert found == {backend} and layer.w2_weight.is_meta


@pytest.mark.parametrize("rotated", [False, True])
def test_a_vocabulary(rotated: bool, gpu: pytest.MonkeyPatch) -> None:
    """Rows of the embedding and logits of the head, as on any device."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config = config_of("w4a4", 8)
    if rotated:
        residual = {"apply": "online", "order": 16, "block": HIDDEN, "sign_seed": 3}
        data = {**config.stored.model_dump(), "rotations": {"residual": residual}}
        config.stored = config._resolved = LowbitConfig.parse(data, "test")
    tensors = stored(100, HIDDEN, Weights(bits=8))
    x, results = torch.randn(4, HIDDEN), []
    for device in (CUDA, torch.device("cpu")):
        gpu.setattr(torch, "get_default_device", lambda device=device: device)
        head = ParallelLMHead(
            100,
            HIDDEN,
            params_dtype=torch.float16,
            quant_config=config,
            prefix="lm_head",
            disable_tp=True,
        )
        for name, parameter in head.named_parameters():
            if name in tensors:
                parameter.weight_loader(parameter, tensors[name])
        if rotated:
            head.input_scale.data.fill_(2.0)
        head.quant_method.process_weights_after_loading(head)
        method = head.quant_method.inner if rotated else head.quant_method
        assert method.backend == ("triton" if device == CUDA else "cpu")
        rows = head.quant_method.embedding(head, torch.tensor([99, 0, 7, 7]))
        results.append((rows, head.quant_method.apply(head, x.half())))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.float16
        assert close(actual.float(), expected.float(), 2e-3)


def test_a_vocabulary_of_16_bits(gpu: pytest.MonkeyPatch) -> None:
    from vllm_lowbit.vocabulary import vocabulary_method

    method = vocabulary_method(config_of("w4a4").resolved, True, "lm_head")
    assert method.backend == "blas"
