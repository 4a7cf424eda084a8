# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint: a model card as the Hugging Face hub reads them.

It has no dates and no paths: the same calibration gives the same bytes.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..lowbit_checkpoint import RECIPE
from ..schema import LowbitConfig, Rotation, Scheme, clipped
from .base_card import CARD, BaseMetadata
from .plan import residual_is_replaced
from .recipe import Recipe
from .text import default_text

TEMPLATE = "model_card.md.j2"
EXPORT_TEMPLATE = "export_card.md.j2"
_PLACES = {
    "residual": "residual stream",
    "attn_input": "input of q, k and v",
    "k": "queries and keys",
    "v": "values, per head",
    "o_input": "input of o_proj",
    "mlp_input": "input of the MLP",
    "down_input": "input of down_proj",
}


@dataclass(frozen=True)
class TextPerplexity:
    """One measured row.

    Attributes:
        text: name of the text.
        tokens: predicted tokens.
        seq_len: tokens of a window.
        base: perplexity of the base model.
        quantized: perplexity of the checkpoint.
    """

    text: str
    tokens: int
    seq_len: int
    base: float
    quantized: float


@dataclass(frozen=True)
class CalibrationText:
    """The windows of :func:`~.text.calibration_windows`."""

    text: str
    samples: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is.

    Texts may hold anything; of a path only the last component is shown.

    Attributes:
        name: of the checkpoint, its directory's name.
        base_model: hub name, or the name of its directory.
        base_revision: commit on the hub.
        base: metadata of the base model.
        config: how it is quantized.
    """

    name: str
    base_model: str
    base_revision: str | None
    base: BaseMetadata
    config: LowbitConfig


@dataclass(frozen=True)
class Card(Identity):
    """Everything the card of a calibrated checkpoint says.

    Attributes:
        recipe: it was made by.
        checkpoint_bytes: of its safetensors files.
        bf16_bytes: of the same model in bf16.
        perplexities: what calibration measured when it was done.
        calibration: what was calibrated on, None for nothing.
        versions: by the name of the package.
        untied: whether one matrix of the base model has become embedding and head.
        up_scaled: whether scales come through from up to down.
    """

    recipe: Recipe
    checkpoint_bytes: int
    bf16_bytes: int
    perplexities: tuple[TextPerplexity, ...]
    calibration: CalibrationText | None
    versions: Mapping[str, str]
    untied: bool = False
    up_scaled: bool = True


@dataclass(frozen=True)
class ExportCard(Identity):
    """Everything the card of an exported checkpoint says.

    Attributes:
        method: ``quant_method`` of its config.json.
        format: of its tensors, as the method calls it.
        scale_dtype: of weight scales, such as ``bfloat16``.
        exported_from: name of the lowbit checkpoint.
        versions: by the name of the package.
    """

    method: str
    format: str
    scale_dtype: str
    exported_from: str
    versions: Mapping[str, str]


def write_card(directory: Path, card: Card) -> Path:
    """Write README.md, replacing one that is there; returns its path."""
    path = directory / CARD
    path.write_bytes(render_card(card).encode())
    return path


def render_card(card: Card) -> str:
    """The card as Markdown with YAML front matter."""
    return _render(
        TEMPLATE,
        card,
        method="lowbit",
        transforms=_transforms(card),
        residual_is_replaced=residual_is_replaced(card.recipe, card.config),
        commands=_commands(card),
    )


def link_report(directory: Path, page: Path) -> None:
    """Name a report in the card of a checkpoint, where it lies inside of it.

    Args:
        directory: of the checkpoint; without a card nothing is done.
        page: the report; one that lies elsewhere, or is named already, is not added.
    """
    card, root = directory / CARD, directory.resolve()
    if not card.is_file() or not page.resolve().is_relative_to(root):
        return
    link = f"[report]({quote(page.resolve().relative_to(root).as_posix())})"
    text = card.read_bytes().decode()
    if link not in text:
        section = f"\n## Report\n\nActivations, errors and transforms: {link}\n"
        card.write_bytes((text.rstrip("\n") + "\n" + section).encode())


def render_export_card(card: ExportCard) -> str:
    """The same of an exported checkpoint."""
    output = f"./{_last_component(card.name)}"
    source = _last_component(card.exported_from)
    export = ["vllm-lowbit", "export", source, "-o", output, "--format", card.method]
    return _render(
        EXPORT_TEMPLATE,
        card,
        method=card.method,
        serve=_command(["vllm", "serve", output]),
        export=_command(export),
    )


def _render(template: str, card: Identity, method: str, **context: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "name": _last_component, "size": _size}
    return environment.get_template(template).render(
        card=card,
        base=_base(card),
        front_matter=_front_matter(card, method),
        quantized=_quantized(card.config.scheme),
        license=_license(card.base),
        **context,
    )


def _front_matter(card: Identity, method: str) -> str:
    base, base_model = card.base, _last_component(card.base_model)
    on_hub = _is_hub_name(base_model)
    data = {
        "license": base.license,
        "license_name": base.license_name,
        "license_link": base.license_link,
        "language": base.language and [_one_line(code) for code in base.language],
        # The hub refuses a card with a name that cannot be one of its own.
        "base_model": base_model if on_hub else None,
        "base_model_relation": "quantized" if on_hub else None,
        "library_name": "vllm",
        "pipeline_tag": base.pipeline_tag,
        "tags": ["vllm", method, "quantized", card.config.scheme.name],
    }
    stated = {
        key: _one_line(value) if isinstance(value, str) else value
        for key, value in data.items()
        if value is not None
    }
    return yaml.safe_dump(stated, sort_keys=False, allow_unicode=True, width=1 << 20)


def _base(card: Identity) -> str:
    """The base model in Markdown, linked if its name says that it is on the hub."""
    name = _last_component(card.base_model)
    text = _markdown(name)
    if "/" in name and _is_hub_name(name):
        text = f"[{text}](https://huggingface.co/{name})"
    if card.base_revision:
        text += f" at revision {_markdown(card.base_revision)}"
    return text


def _commands(card: Card) -> dict[str, str]:
    name, base_model = (_last_component(n) for n in (card.name, card.base_model))
    calibrate = ["vllm-lowbit", "calibrate", base_model, "-o", f"./{name}"]
    calibrate += ["--recipe", RECIPE]
    text = card.calibration and _last_component(card.calibration.text)
    if text and text != default_text().name:
        calibrate += ["--data", text]
    return {
        "serve": _command(["vllm", "serve", f"./{name}"]),
        "calibrate": _command(calibrate),
    }


def _command(words: list[str]) -> str:
    return " ".join(shlex.quote(_one_line(word)) for word in words)


def _quantized(scheme: Scheme) -> dict[str, str]:
    """Grid of each part of the model."""
    weights, activations = scheme.weights, scheme.activations
    per = (
        "output channel"
        if weights.group_size is None
        else f"{weights.group_size} inputs of an output channel"
    )
    return {
        "weights of the linear layers": f"int{weights.bits} "
        f"{_symmetry(weights.symmetric)}, one scale per {per}",
        "their inputs": "16 bits"
        if activations.bits == 16
        else f"int{activations.bits} {_symmetry(activations.symmetric)}, dynamic, one "
        f"scale per {activations.per}{clipped(activations.kept())}",
        "KV cache": "16 bits"
        if scheme.kv_cache.bits == 16
        else f"int{scheme.kv_cache.bits} asymmetric, one scale and zero per token and "
        "head",
        "embedding and head": "16 bits"
        if scheme.vocab_bits == 16
        else f"int{scheme.vocab_bits} symmetric, one scale per row",
        "norms and biases": "not quantized",
    }


def _symmetry(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _transforms(card: Card) -> dict[str, str]:
    """Transform of each place that has one."""
    rows = {}
    for name, rotation in card.config.rotations:
        if isinstance(rotation, Rotation):
            rows[_PLACES[name]] = _rotation(rotation)
    up = ", up and down" if card.up_scaled else ""
    if card.recipe.transforms.scales_are_learned:
        places = f"between norms and linears, v and o, k and q{up}"
        rows[places] = "learned scales, folded"
    elif card.recipe.transforms.equalize:
        rows[f"between v and o{up}"] = "scales from weights and inputs, folded"
    if card.recipe.transforms.smooth is not None:
        rows[f"between norms and linears, v and o{up}"] = (
            f"SmoothQuant's scales, alpha {card.recipe.transforms.smooth}, folded"
        )
    if card.recipe.weights.method == "omniquant":
        let = card.recipe.omniquant.let
        if card.config.scheme.activations.bits != 16 if let is None else let:
            rows[f"between norms and linears, v and o, q and k{up}"] = (
                "scales that OmniQuant learned, folded"
            )
    return rows


def _rotation(rotation: Rotation) -> str:
    matrix = "learned orthogonal matrix"
    if rotation.kind == "hadamard":
        matrix = "Hadamard" if rotation.sign_seed is None else "random-sign Hadamard"
    text = f"{matrix} of order {rotation.order}"
    if rotation.stride > 1:
        text += f" across elements {rotation.stride} apart"
    if rotation.scaled:
        text += ", after scales that are powers of two"
    return text + (", online" if rotation.apply == "online" else ", folded")


def _license(base: BaseMetadata) -> str | None:
    """The licence in words, None where none is stated."""
    parts = (base.license, base.license_name, base.license_link)
    stated = [_markdown(part) for part in parts if part]
    return ", ".join(stated) or None


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _last_component(name: str) -> str:
    """Of a path its last component; a hub name and anything else stays as it is."""
    is_path = name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_path else name


def _one_line(text: str) -> str:
    """Without line breaks and whatever else does not print."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a paragraph, a heading or a table."""
    return re.sub(r"([\\`*_\[\]<>#|~&!$])", r"\\\1", _one_line(text))


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 1e9:.2f} GB"
        if num_bytes >= 10**9
        else f"{num_bytes / 1e6:.1f} MB"
    )
