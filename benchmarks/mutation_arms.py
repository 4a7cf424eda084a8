# SPDX-License-Identifier: Apache-2.0
"""One arm of benchmarks.mutations: its checkpoint, and loading each mutation of it.

As a program it takes an arm, the sound checkpoint and the first mutation, and prints a
JSON line for each.
"""

import importlib
import importlib.util
import json
import math
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
SECONDS = 300
PROMPT_TOKENS = ((5, 90, 700, 31), (1000, 12, 55), (200, 201, 202, 203), (3000, 9))
NEW_TOKENS = 16
VARIANT = "rotated"
# The others are of the manifest, of our quantization_config, or of codes that
# compressed-tensors has and our symmetric grid lacks.
KINDS = (
    "deleted tensor",
    "renamed tensor",
    "extra tensor",
    "wrong shape",
    "wrong dtype",
    "bit flip",
    "swapped data",
    "impossible scale",
    "not finite",
    "broken file",
    "broken header",
    "other header",
    "moved file",
    "wrong sizes",
    "other model config",
    "other architecture",
)
WEIGHTS = "config_groups/group_0/weights"
INPUTS = "config_groups/group_0/input_activations"
# Detail, key of each format, value.
QUANTIZATION: tuple[tuple[str, str, str, Any], ...] = (
    ("unknown key", "surprise", "surprise", 1),
    ("unknown key of weights", f"{WEIGHTS}/surprise", "scheme/weights/surprise", 1),
    ("bits of other files", f"{WEIGHTS}/num_bits", "scheme/weights/bits", 4),
    ("bits that cannot be", f"{WEIGHTS}/num_bits", "scheme/weights/bits", -4),
    ("bits of true", f"{WEIGHTS}/num_bits", "scheme/weights/bits", True),
    ("other group size", f"{WEIGHTS}/group_size", "scheme/weights/group_size", 64),
    ("group size of 0", f"{WEIGHTS}/group_size", "scheme/weights/group_size", 0),
    ("asymmetric", f"{WEIGHTS}/symmetric", "scheme/weights/symmetric", False),
    ("no weights", WEIGHTS, "scheme/weights", None),
    ("other inputs", f"{INPUTS}/num_bits", "scheme/activations/bits", 4),
    ("unknown format", "format", "format_version", "other"),
)


@dataclass(frozen=True)
class Arm:
    """How one server is started.

    Attributes:
        title: of its table.
        plugins: VLLM_PLUGINS; empty loads none.
        codes: what the tensors of codes are called.
        key: which of the keys of QUANTIZATION are its own.
    """

    title: str
    plugins: str
    codes: str
    key: int


ARMS = {
    "stock": Arm("Stock vLLM, compressed-tensors W8A8", "", "weight", 1),
    "lowbit": Arm("This plugin, lowbit w8a8", "lowbit", "weight_packed", 2),
}


def write_checkpoint(arm: str, source: Path, directory: Path) -> None:
    """Write the sound checkpoint of an arm."""
    if arm == "stock":
        foreign = _load("foreign_checkpoint", TESTS / "foreign_checkpoint.py")
        foreign.foreign_checkpoint(
            directory, source, "int-quantized", bits=8, activations=8
        )
        return
    from vllm_lowbit.calibrate.pipeline import calibrate
    from vllm_lowbit.calibrate.recipe import load_recipe
    from vllm_lowbit.calibrate.text import default_text

    recipe = load_recipe("rtn").override("w8a8", samples=8)
    calibrate(str(source), directory, recipe, default_text())


def applicable(arm: str) -> list[Any]:
    """The mutations of an arm, the same in number and order for each."""
    package = _load("lowbit_mutations", TESTS / "mutations" / "__init__.py")
    module = importlib.import_module(f"{package.__name__}.catalogue")
    edits = importlib.import_module(f"{package.__name__}.edits")
    chosen = [
        mutation
        for mutation in module.catalogue(ARMS[arm].codes)
        if mutation.variant == VARIANT and mutation.kind in KINDS and not mutation.agree
    ]
    kind = type(chosen[0])
    for row in QUANTIZATION:
        keys = row[ARMS[arm].key]
        edit = edits.put("config.json", f"quantization_config/{keys}", row[-1])
        named = keys.split("/")[-1]
        chosen.append(kind("quantization config", VARIANT, edit, named, row[0]))
    return chosen


def _load(name: str, file: Path) -> ModuleType:
    """A module, or a package by its __init__, that is not on the path."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    arm, directory, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGALRM, _give_up)
    expected = _generate(directory)
    for mutation in applicable(arm)[first:]:
        row = {"kind": mutation.kind, "name": mutation.name}
        row |= _outcome(directory, mutation, expected)
        print(json.dumps(row), flush=True)


def _give_up(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")


def _outcome(sound: Path, mutation: Any, expected: list[Any]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(shutil.copytree(sound, Path(parent) / "checkpoint"))
        mutation.edit(directory)
        signal.alarm(SECONDS)
        try:
            served = _generate(directory)
        except _FirstRequestError as error:
            return {"outcome": "first request fails", "message": str(error)[:200]}
        except TimeoutError as error:
            return {"outcome": "crashes or hangs", "message": str(error)}
        except Exception as error:
            text = " / ".join(_texts(error)).replace(str(directory), "")
            named = _is_named(mutation, text)
            outcome = "refused by name" if named else "refused, no name"
            return {"outcome": outcome, "message": text[:200]}
        finally:
            signal.alarm(0)
    return {"outcome": f"serves {_compare(served, expected)}", "message": ""}


class _FirstRequestError(Exception):
    """The engine started and then could not answer."""


def _generate(directory: Path) -> list[Any]:
    """Tokens and log-probabilities of a few prompts, by an engine of its own."""
    from vllm import LLM, SamplingParams

    from vllm_lowbit.calibrate.offline_engine import release

    llm = None
    try:
        llm = LLM(
            str(directory),
            max_model_len=256,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        sampling = SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": list(ids)} for ids in PROMPT_TOKENS]
        try:
            answers = llm.generate(prompts, sampling, use_tqdm=False)
        except TimeoutError:
            raise
        except Exception as error:
            raise _FirstRequestError(repr(error)) from error
        return [
            [(token, found[token].logprob) for token, found in _steps(answer)]
            for answer in answers
        ]
    finally:
        release(llm)


def _steps(answer: Any) -> Iterator[tuple[int, Any]]:
    output = answer.outputs[0]
    return zip(output.token_ids, output.logprobs, strict=True)


def _compare(served: list[Any], expected: list[Any]) -> str:
    pairs = [pair for answer in served for pair in answer]
    if any(math.isnan(logprob) for _, logprob in pairs):
        return "NaN"
    tokens = [token for token, _ in pairs]
    same = tokens == [token for answer in expected for token, _ in answer]
    return "the same tokens" if same else "other tokens"


def _texts(error: BaseException | None) -> Iterator[str]:
    """Messages of an error and of what caused it."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


def _is_named(mutation: Any, message: str) -> bool:
    """Whether a message names what is wrong; generous to vLLM's own names of things.

    A renamed tensor has two names, of two that were exchanged either is wrong, a fused
    layer stands for its parts, and a module in quotes for its tensors.
    """
    names = [mutation.named]
    if mutation.kind in ("renamed tensor", "swapped data"):
        names.append(mutation.detail)
    for name in names:
        own = name.removeprefix("model.")
        fused = re.sub(r"[qkv]_proj", "qkv_proj", own)
        fused = re.sub(r"(gate|up)_proj", "gate_up_proj", fused)
        if any(replace(mutation, named=n).is_named(message) for n in (own, fused)):
            return True
        parts = own.split(".")
        modules = (".".join(parts[:end]) for end in range(1, len(parts)))
        if any(f"'{module}'" in message for module in modules):
            return True
    return False


if __name__ == "__main__":
    main()
