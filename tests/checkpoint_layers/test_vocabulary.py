# SPDX-License-Identifier: Apache-2.0
"""Embedding and head inside vLLM, of a lowbit checkpoint and by flag."""

from typing import Any

import pytest
import torch

from vllm_lowbit.errors import CheckpointError, UnsupportedError
from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
from vllm_lowbit.schema import LoadTimeOptions, Weights

pytest.importorskip("vllm")
from .tensors import HIDDEN, VOCAB, load, quantized


class TestVocabulary:
    ROTATION = {"apply": "online", "order": 12, "block": 384, "sign_seed": 3}

    def embedding(self, config: Any) -> Any:
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            VocabParallelEmbedding,
        )

        return VocabParallelEmbedding(
            VOCAB, HIDDEN, torch.float32, quant_config=config, disable_tp=True
        )

    def head(self, config: Any) -> Any:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        return ParallelLMHead(
            VOCAB,
            HIDDEN,
            params_dtype=torch.float32,
            quant_config=config,
            prefix="lm_head",
            disable_tp=True,
        )

    @pytest.fixture
    def by_flag(self, engine: Any) -> Any:
        """Config of the flag with 8 bits for the vocabulary."""
        from vllm_lowbit.config import LowbitQuantizationConfig

        config = LowbitQuantizationConfig(LoadTimeOptions(vocab_bits=8))
        model = engine.model_config
        config.maybe_update_config(model.model, model.hf_config)
        return config

    def finish(self, *layers: Any) -> None:
        """What vLLM does once everything is loaded."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_processing,
        )

        for layer in layers:
            finalize_layerwise_processing(layer, None)
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)

    def logits(self, head: Any, x: torch.Tensor) -> torch.Tensor:
        rows = head.quant_method.apply(head, x)
        assert rows.shape == (len(x), 128) and (rows[:, VOCAB:] == 0).all()
        return rows[:, :VOCAB]

    def check(self, embedding: Any, head: Any, table: torch.Tensor) -> None:
        """8 bits of both, padding that cannot be sampled, and nothing else kept."""
        sizes = {name: p.nbytes for name, p in embedding.named_parameters()}
        assert sizes.pop("weight") == 128 * HIDDEN
        assert all(size == 4 * 128 for size in sizes.values())
        ids, x = torch.tensor([0, 7, VOCAB - 1]), torch.randn(5, HIDDEN)
        assert torch.equal(embedding(ids), table[ids])
        expected = x.double() @ table.double().t()
        torch.testing.assert_close(
            self.logits(head, x), expected.float(), rtol=0, atol=1e-4
        )

    @pytest.mark.parametrize("tied", [True, False])
    def test_checkpoint(self, tied: bool, quant: Any) -> None:
        config = quant("w4a4", 8)
        embedding, head = self.embedding(config), self.head(config)
        tensors = quantized(VOCAB, HIDDEN, Weights(bits=8))
        load(embedding, tensors)
        if tied:
            head = head.tie_weights(embedding)
            assert not list(head.parameters())
        else:
            load(head, tensors)
        self.finish(embedding, head)
        zero = torch.zeros(VOCAB, 1, dtype=torch.int32)
        table = decode(tensors["codes"], tensors["weight_scale"], zero)
        self.check(embedding, head, table)

    @pytest.mark.parametrize("tied", [True, False])
    def test_flag(self, tied: bool, by_flag: Any) -> None:
        embedding, head = self.embedding(by_flag), self.head(by_flag)
        assert embedding.weight.is_meta
        matrix = torch.randn(VOCAB, HIDDEN)
        if tied:
            head = head.tie_weights(embedding)
        else:
            load(head, {"weight": matrix})
        load(embedding, {"weight": matrix})
        self.finish(embedding, head)
        kept = len(list(embedding.parameters()))
        assert len(list(head.parameters())) == (0 if tied else kept)
        table = decode(*quantize_weight(matrix, IntGrid(8), None))
        self.check(embedding, head, table)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_flag_checks_the_matrix(self, bad: float, by_flag: Any) -> None:
        embedding, matrix = self.embedding(by_flag), torch.randn(VOCAB, HIDDEN)
        matrix[-1, -1] = bad
        load(embedding, {"weight": matrix})
        with pytest.raises(CheckpointError, match="^tensor model.embed_tokens.weight "):
            self.finish(embedding)

    def test_flag_needs_all_of_it(self, by_flag: Any) -> None:
        head = self.head(by_flag)
        message = "^layer lm_head: only 0 of 38400 elements are in the checkpoint"
        with pytest.raises(CheckpointError, match=message):
            self.finish(head)

    @pytest.mark.parametrize("missing", ["weight_packed", "weight_scale"])
    def test_checkpoint_needs_all_of_it(self, missing: str, quant: Any) -> None:
        embedding = self.embedding(quant("w4a4", 8))
        tensors = quantized(VOCAB, HIDDEN, Weights(bits=8))
        del tensors[missing]
        load(embedding, tensors)
        message = f"^tensor model.embed_tokens.{missing} holds "
        with pytest.raises(CheckpointError, match=message):
            self.finish(embedding)

    @pytest.mark.parametrize("vocab_bits", [16, 8])
    @pytest.mark.parametrize("seed", [3, None])
    def test_online_residual(
        self, vocab_bits: int, seed: int | None, quant: Any
    ) -> None:
        """Looked up, rotated, undone and scaled: the plain embedding again."""
        rotation = {**self.ROTATION, "sign_seed": seed}
        config = quant("w4a4", vocab_bits, residual=rotation)
        embedding, head = self.embedding(config), self.head(config)
        head = head.tie_weights(embedding)
        matrix, gamma = torch.randn(VOCAB, HIDDEN), torch.rand(HIDDEN) + 0.5
        tensors = quantized(VOCAB, HIDDEN, Weights(bits=8))
        table = matrix
        if vocab_bits == 8:
            zero = torch.zeros(VOCAB, 1, dtype=torch.int32)
            table = decode(tensors["codes"], tensors["weight_scale"], zero)
        load(embedding, {**tensors, "weight": matrix})
        load(head, {"input_scale": gamma})
        self.finish(embedding, head)
        ids = torch.arange(VOCAB)
        rotated = embedding(ids)
        assert (rotated - table).norm() > table.norm() / 2
        torch.testing.assert_close(rotated.norm(dim=-1), table.norm(dim=-1))
        expected = (table * gamma).double() @ table.double().t()
        torch.testing.assert_close(
            self.logits(head, rotated), expected.float(), rtol=0, atol=2e-3
        )

    def test_online_residual_needs_its_scale(self, quant: Any) -> None:
        config = quant("w4a4", residual=self.ROTATION)
        embedding, head = self.embedding(config), self.head(config)
        head = head.tie_weights(embedding)
        load(embedding, {"weight": torch.randn(VOCAB, HIDDEN)})
        with pytest.raises(CheckpointError, match="^tensor lm_head.input_scale holds"):
            self.finish(embedding, head)

    def test_backend(self, quant: Any) -> None:
        with torch.device("meta"):
            with pytest.raises(UnsupportedError, match="^layer lm_head: no backend ru"):
                self.head(quant("w4a4", 8))
