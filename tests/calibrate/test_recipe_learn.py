# SPDX-License-Identifier: Apache-2.0
"""Recipes that learn: the learn section, its sizes, and where it has no effect."""

import pytest
import yaml
from pydantic import ValidationError

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.recipe import (
    Recipe,
    built_in_recipes,
    load_recipe,
    parse_recipe,
)
from vllm_lowbit.errors import ConfigError

LEARNED = {"residual": "learned", "scales": "learned"}
CLIPS = {"clip": "learned", "clip_ratio": 0.9}


def _learning(**learn: object) -> dict[str, object]:
    return {"transforms": LEARNED, "learn": learn}


class TestLearn:
    @pytest.mark.parametrize("name", ["spinquant", "ostquant"])
    def test_built_in(self, name: str) -> None:
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.learns
        assert recipe.transforms.residual == recipe.transforms.value == "learned"
        assert recipe.transforms.scales_are_learned == (name == "ostquant")
        assert recipe.weights == load_recipe("quarot-gptq").weights
        assert recipe.data == load_recipe("quarot-gptq").data

    def test_the_best_is_ostquant_and_more(self) -> None:
        best, published = load_recipe("lowbit-best"), load_recipe("ostquant")
        coarse = best.learn.model_copy(update={"extra_weight_bits": 0})
        assert (best.transforms, coarse) == (published.transforms, published.learn)
        assert best.learn.extra_weight_bits
        assert best.weights.method == "gptaq" and best.weights.act_order
        assert best.activations.clip_ratio < 1

    def test_clip_ratios_are_learned_alone_or_with_transforms(self) -> None:
        alone = Recipe.model_validate({"activations": CLIPS})
        section = yaml.safe_load(alone.text())["learn"]
        assert "clip_lr" in section and "scale_lr" not in section
        assert yaml.safe_load(alone.text())["activations"].items() >= CLIPS.items()
        assert alone.learns and alone.clip == "learned"
        both = Recipe.model_validate(
            _learning(clip_lr=0.1, scale_lr=0.2) | {"activations": CLIPS}
        )
        assert parse_recipe(both.text().encode(), "r.yaml") == both
        # Where inputs are not quantized there is nothing to clip.
        floats = both.override(scheme="w4a16")
        assert floats.learns and floats.clip == "fixed" and not floats.learns_clips
        assert "clip_lr" not in floats.text()
        nothing = alone.override(scheme="w4a16")
        assert not nothing.learns and "learn:" not in nothing.text()
        assert nothing.override(scheme=alone.scheme) == alone

    def test_omniquant_learns_clip_ratios_by_itself(self) -> None:
        """Also where other things are learned end to end."""
        omniquant = {"weights": {"method": "omniquant"}, "activations": CLIPS}
        blocks = Recipe.model_validate(omniquant)
        assert not blocks.learns and blocks.clip == "learned"
        assert "input_clip_rate" in blocks.text()
        rotated = {**omniquant, "transforms": {"value": "learned"}}
        both = Recipe.model_validate(rotated)
        assert both.learns and both.clip == "learned" and not both.learns_clips
        assert "clip_lr" not in both.text() and "input_clip_rate" in both.text()
        with pytest.raises(ValidationError, match="clip_lr has no effect where no cl"):
            Recipe.model_validate({**rotated, "learn": {"clip_lr": 0.1}})

    def test_built_in_recipes_learn_no_clip_ratios(self) -> None:
        for name in built_in_recipes():
            text = load_recipe(name).text()
            assert not {"clip:", "clip_lr:", "input_clip_rate:"} & set(text.split())

    def test_keys_without_effect_are_not_in_the_text(self) -> None:
        assert "learn" not in load_recipe("lowbit").text()
        scales = Recipe.model_validate({"transforms": {"scales": "learned"}})
        section = yaml.safe_load(scales.text())["learn"]
        assert section.keys() == {
            "loss",
            "top_k",
            "renormalise",
            "scale_lr",
            "steps",
            "tokens_per_step",
            "quantize_weights",
        }
        rotations = Recipe.model_validate(
            {"transforms": {"value": "learned"}, "learn": {"loss": "mse"}}
        )
        section = yaml.safe_load(rotations.text())["learn"]
        assert "scale_lr" not in section and "top_k" not in section
        learn = {"quantize_weights": True, "extra_weight_bits": 1}
        finer = Recipe.model_validate(
            {"transforms": {"scales": "learned"}, "learn": learn}
        )
        assert yaml.safe_load(finer.text())["learn"]["extra_weight_bits"] == 1
        for recipe in (scales, rotations, finer):
            assert parse_recipe(recipe.text().encode(), "r.yaml") == recipe

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (
                {"learn": {"steps": 3}},
                ":2: key learn: has no effect without a transform that is learned",
            ),
            (
                {"transforms": {"scales": "learned"}, "learn": {"start": "womi"}},
                "key learn: start has no effect where no rotation is learned",
            ),
            (
                {"transforms": {"value": "learned"}, "learn": {"scale_lr": 0.1}},
                "key learn: scale_lr has no effect where no scale is learned",
            ),
            (
                {"transforms": {"value": "learned"}, "learn": {"clip_lr": 0.1}},
                "key learn: clip_lr has no effect where no clip ratio is learned",
            ),
            (
                {
                    "weights": {"method": "omniquant"},
                    "activations": {"clip": "learned"},
                    "learn": {"steps": 3},
                },
                "key learn: has no effect without .* any method but omniquant",
            ),
            (
                _learning(loss="mse", top_k=5),
                "key learn.top_k: has an effect with loss kl_top only",
            ),
            (_learning(loss="kl"), "key learn.loss: Input should be 'kl_top', 'mse'"),
            (_learning(step=3), "key learn.step does not exist; did you mean steps?"),
            (_learning(steps=0), "key learn.steps: .* greater than or equal to 1"),
            (_learning(rotation_lr=0.0), "key learn.rotation_lr: .*greater than 0"),
            (_learning(optimizer="sgd"), "key learn.optimizer: Input should be"),
        ],
    )
    def test_refused(self, document: dict[str, object], message: str) -> None:
        text = "seed: 1\n" + yaml.safe_dump(document, sort_keys=False)
        with pytest.raises(ConfigError, match=message):
            parse_recipe(text.encode(), "r.yaml")

    def test_sizes_follow_the_model(self) -> None:
        def sized(layers: int, hidden: int) -> tuple[int | None, int | None]:
            shape = ModelShape(
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_layers=layers,
                num_heads=hidden // 64,
                num_kv_heads=hidden // 64,
                head_dim=64,
                vocab_size=4096,
                tie_word_embeddings=False,
            )
            learn = load_recipe("ostquant").sized(shape).learn
            return learn.steps, learn.tokens_per_step

        small, large = sized(6, 256), sized(32, 4096)
        assert small[1] == 2048 and large[1] == 65536
        assert small[0] is not None and large[0] is not None
        assert 100 <= large[0] < small[0]
        assert sized(200, 16384) == (100, 65536)

    def test_given_sizes_stay(self) -> None:
        recipe = Recipe.model_validate(_learning(steps=7, tokens_per_step=100))
        shape = ModelShape(64, 64, 1, 1, 1, 64, 64, False)
        assert recipe.sized(shape) == recipe
        assert load_recipe("lowbit").sized(shape) == load_recipe("lowbit")
