# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on the same model in Q4_0, by its own llama-bench.

llama-quantize has to lie beside the llama-bench that ``--llama-bench`` names. Both are
built from the source that the llama-cpp-python package carries:

    pip download llama-cpp-python --no-binary llama-cpp-python --no-deps
    tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \\
      -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \\
      -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-bench llama-quantize

Writing the model needs the ``gguf`` package. Rows of q and k keep the order that vLLM
has them in: with random weights any order is the same model.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from .checkpoints import bf16_checkpoint, tensors
from .options import Options

NAME = "llama-cpp"
CELL = "llama-bench Q4_0"
QUANTIZATION = "Q4_0"
PROMPTS = (128, 1024)
GENERATED = 128
REPETITIONS = 3
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def cells(options: Options) -> list[str]:
    """One, or none without llama-bench."""
    return [] if skipped(options) else [CELL]


def skipped(options: Options) -> str | None:
    """Why nothing is measured, or None."""
    path = options.llama_bench
    if path is None:
        return (
            "no --llama-bench was given; benchmarks/cpu/llama_cpp.py says how to build"
        )
    for file in (path, path.with_name("llama-quantize")):
        if not file.is_file():
            return (
                f"{file} does not exist; benchmarks/cpu/llama_cpp.py says how to build"
            )
    return None


def measure(cell: str, options: Options) -> dict[str, Any]:
    """Tokens per second of prompts and of generation, batch 1."""
    assert options.llama_bench is not None
    model = gguf_checkpoint(options, options.llama_bench.with_name("llama-quantize"))
    words = ["-t", str(options.threads), "-p", ",".join(map(str, PROMPTS))]
    words += ["-n", str(GENERATED), "-r", str(REPETITIONS), "-o", "json"]
    command = [str(options.llama_bench), "-m", str(model), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout)
    return {
        "command": " ".join(("llama-bench", "-m", model.name, *words)),
        "build": f"{rows[0]['build_commit']} ({rows[0]['build_number']})",
        "file_bytes": model.stat().st_size,
        "model_bytes": rows[0]["model_size"],
        "tokens_per_s": {_name(row): _median(row["samples_ts"]) for row in rows},
        "samples": {_name(row): row["samples_ts"] for row in rows},
    }


def _name(row: dict[str, Any]) -> str:
    return f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def gguf_checkpoint(options: Options, quantize: Path) -> Path:
    """The model as a GGUF file in Q4_0, written when it is not there.

    Args:
        options: of this run.
        quantize: llama-quantize, which chooses the types of the tensors.
    """
    made = options.cache / options.model_name / f"{QUANTIZATION.lower()}.gguf"
    if made.is_file():
        return made
    source = made.with_name("bf16.gguf")
    staging = made.with_suffix(".new")
    _write_gguf(bf16_checkpoint(options), source, options.model)
    command = [str(quantize), str(source), str(staging), QUANTIZATION]
    subprocess.run([*command, str(options.threads)], check=True)
    source.unlink()
    staging.rename(made)
    return made


def _write_gguf(checkpoint: Path, file: Path, model: dict[str, Any]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(model["max_position_embeddings"])
    writer.add_embedding_length(model["hidden_size"])
    writer.add_block_count(model["num_hidden_layers"])
    writer.add_feed_forward_length(model["intermediate_size"])
    writer.add_head_count(model["num_attention_heads"])
    writer.add_head_count_kv(model["num_key_value_heads"])
    writer.add_key_length(model["head_dim"])
    writer.add_value_length(model["head_dim"])
    writer.add_rope_dimension_count(model["head_dim"])
    writer.add_rope_freq_base(model["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(model["rms_norm_eps"])
    writer.add_vocab_size(model["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, tensor in tensors(checkpoint):
        if tensor.dim() == 1:
            writer.add_tensor(_gguf_name(name), tensor.float().numpy())
            continue
        writer.add_tensor(
            _gguf_name(name),
            tensor.view(torch.uint8).numpy(),
            raw_dtype=gguf.GGMLQuantizationType.BF16,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"
