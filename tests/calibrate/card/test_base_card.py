# SPDX-License-Identifier: Apache-2.0
"""What is read from the card of the base model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lowbit.calibrate.base_card import BaseMetadata, base_metadata
from vllm_lowbit.calibrate.card import write_card

from .cards import CARD

MODELS = Path(__file__).parents[3] / "models"


class TestBaseMetadata:
    def test_of_the_model_here(self) -> None:
        assert base_metadata(MODELS / "ref-7m") == BaseMetadata(
            license="apache-2.0", language=("en",), pipeline_tag="text-generation"
        )

    def test_everything(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(
            "\ufeff---\r\nlicense: other\r\nlicense_name: llama3.2\n"
            "license_link: https://x.org/LICENSE\nlanguage:\n- en\n- no\n"
            "pipeline_tag: text-generation\ntags: [a]\nmodel-index:\n"
            "- name: x\n  results:\n  - task: {type: y}\n    metrics:\n"
            "    - type: z\n      value: 1\n---  \r\n# Title\n---\nlicense: mit\n---",
            encoding="utf-8",
        )
        assert base_metadata(tmp_path) == BaseMetadata(
            license="other",
            license_name="llama3.2",
            license_link="https://x.org/LICENSE",
            language=("en", "no"),
            pipeline_tag="text-generation",
        )

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "# Title\n",
            "# Title\n---\nlicense: mit\n---\n",
            "---\nlicense: mit\n",
            "---\n---\n",
            "---\nmit\n---\n",
            "---\n- license\n---\n",
            "---\nlicense: [\n---\n",
            "---\nlicense: mit\nlicense: mit\n---\n",
            "---\nlicense: &a mit\nlanguage: *a\n---\n",
            "---\nlicense: !!python/object:x.y mit\n---\n",
            "---\nlicense: 3\nlanguage: true\npipeline_tag:\n---\n",
            "---\nlicense: ''\nlanguage: [en, 3]\nlicense_name: {a: b}\n---\n",
            "---\nlanguage: []\nlicense_link: [a]\n---\n",
            "---\nlicense: \x00\n---\n",
            b"---\nlicense: \xff\n---\n",
            "---\n" + "[" * 60000 + "\n---\n",
            "---\n" + "a" * (1 << 20) + "\n---\n",
        ],
    )
    def test_malformed_says_nothing(
        self, tmp_path: Path, content: str | bytes, recwarn: pytest.WarningsRecorder
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "README.md").write_bytes(data)
        assert base_metadata(tmp_path) == BaseMetadata()
        assert not recwarn.list

    def test_no_file(self, tmp_path: Path) -> None:
        assert base_metadata(tmp_path) == BaseMetadata()
        assert base_metadata(tmp_path / "missing") == BaseMetadata()
        (tmp_path / "README.md").mkdir()
        assert base_metadata(tmp_path) == BaseMetadata()

    @given(content=st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
    def test_any_front_matter(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        directory = tmp_path_factory.getbasetemp() / "base"
        directory.mkdir(exist_ok=True)
        (directory / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
        base_metadata(directory)

    def test_a_card_is_metadata_again(self, tmp_path: Path) -> None:
        write_card(tmp_path, CARD)
        assert base_metadata(tmp_path) == CARD.base
