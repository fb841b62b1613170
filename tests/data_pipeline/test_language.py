from pathlib import Path

import pytest

from data_pipeline.language import LanguageModel
from megagpt.errors import DataError


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The ducks swim on the pond\nbecause they like the water.", "en"),
        ("Die Enten schwimmen auf dem Teich, weil sie das Wasser lieben.", "de"),
        ("Les canards nagent sur l'étang parce qu'ils aiment l'eau.", "fr"),
        ("Утки плавают на пруду, потому что они любят воду.", "ru"),
        ("鸭子在池塘里游泳因为它们喜欢水。", "zh"),
    ],
)
def test_a_sentence_is_recognised(text: str, code: str) -> None:
    found, score = LanguageModel().identify(text)
    assert found == code
    assert 0.65 <= score <= 1.0


def test_only_the_beginning_of_a_text_decides() -> None:
    model = LanguageModel()
    english = "The ducks swim on the pond because they like the water. " * 40
    assert model.identify(english[:2000]) == model.identify(english[:2000] + "Die Enten schwimmen auf dem Teich. " * 90)


def test_a_missing_model_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.ftz: no language model there"):
        LanguageModel(tmp_path / "x.ftz")
    (tmp_path / "y.ftz").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"y.ftz: not a fastText model"):
        LanguageModel(tmp_path / "y.ftz")
