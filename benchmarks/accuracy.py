# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the flag-only schemes, by the reference model.

    python -m benchmarks.accuracy

writes results/accuracy.json and results/accuracy.md.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_lowbit.calibrate.perplexity import perplexity, tokenize
from vllm_lowbit.calibrate.reference_model import ReferenceModel, load_time_config
from vllm_lowbit.schema import SCHEME_NAMES, scheme_from_name

from .environment import as_line, describe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).parent / "data" / "wikitext-2" / "test.txt"
MODELS = ("ref-7m", "ref-7m-outliers")
SCHEMES = (*SCHEME_NAMES, "w4a16-g128", "w3a16-g128", "w2a16-g64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()

    rows: dict[str, dict[str, float]] = {"float": {}}
    rows |= {scheme: {} for scheme in SCHEMES}
    rows |= {f"{name}, symmetric activations": {} for name in ("w4a4kv4", "w6a6")}
    for model in MODELS:
        directory = str(ROOT / "models" / model)
        ids = tokenize(directory, TEXT, arguments.max_tokens)
        for name in tqdm(rows, desc=model):
            reference = _reference(directory, name)
            result = perplexity(reference, ids, arguments.seq_len)
            rows[name][model] = round(result.perplexity, 3)
    _write(rows, arguments.max_tokens, arguments.seq_len)


def _reference(directory: str, name: str) -> ReferenceModel:
    if name == "float":
        return ReferenceModel(directory, None)
    scheme, _, symmetric = name.partition(",")
    config = load_time_config(directory, scheme_from_name(scheme, bool(symmetric)))
    return ReferenceModel(directory, config)


def _write(rows: dict[str, dict[str, float]], tokens: int, seq_len: int) -> None:
    environment = describe()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "accuracy.json").write_text(
        json.dumps({"environment": environment, "perplexity": rows}, indent=2) + "\n"
    )
    lines = [
        "# Perplexity with the flag alone",
        "",
        f"WikiText-2 test, first {tokens} tokens, contexts of {seq_len}; reference",
        "model in float32, quantized while loading, without data. Lower is better.",
        "",
        f"`python -m benchmarks.accuracy`: {as_line(environment)}",
        "",
        f"| scheme | {' | '.join(MODELS)} |",
        "|---|" + "---|" * len(MODELS),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{row[m]:.2f}" for m in MODELS) + " |"
        for name, row in rows.items()
    ]
    (RESULTS / "accuracy.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
