"""Reports as vectors: what they keep, what is behind them, and that nothing changes on disk."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression

from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import UsageError
from pathopipe.metadata.text import TextVectorizer, TransformersText

COMMON = [
    "the",
    "specimen",
    "was",
    "received",
    "and",
    "shows",
    "tissue",
    "with",
    "margins",
    "free",
    "of",
    "any",
    "change",
    "in",
    "all",
    "sections",
]


def reports(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    organs = np.where(labels, "nephrectomy kidney", "colectomy bowel")
    return [
        f"{' '.join(rng.choice(COMMON, 30))} {organ} {' '.join(rng.choice(COMMON, 10))}" for organ in organs
    ], labels


TEXTS, LABELS = reports(80, 0)


def test_vectors_tell_what_reports_tell() -> None:
    vectorizer = TextVectorizer(width=16).fit(TEXTS)
    model = LogisticRegression().fit(vectorizer.transform(TEXTS), LABELS)
    others, labels = reports(60, 1)
    assert model.score(vectorizer.transform(others), labels) == 1


def test_letters_bridge_scanning_errors() -> None:
    vectorizer = TextVectorizer(width=16).fit(TEXTS)
    model = LogisticRegression().fit(vectorizer.transform(TEXTS), LABELS)
    assert model.predict(
        vectorizer.transform(["nephrectorny of the kidncy", "coleotomy of the bovvel colectorny"])
    ).tolist() == [1, 0]


def test_full_width_keeps_every_angle() -> None:
    vectorizer = TextVectorizer(width=500, max_features=2000).fit(TEXTS)
    whole = vectorizer._weigh(vectorizer._counts(TEXTS)).toarray()
    vectors = vectorizer.transform(TEXTS)
    kept = vectors @ vectors.T
    np.testing.assert_allclose(kept / kept[0, 0], whole @ whole.T / (whole @ whole.T)[0, 0], atol=1e-3)
    assert np.isclose((vectors**2).mean(), 1, rtol=1e-3)


def test_the_words_behind_a_direction_are_named() -> None:
    vectorizer = TextVectorizer(width=16).fit(TEXTS)
    model = LogisticRegression().fit(vectorizer.transform(TEXTS), LABELS)
    text = TEXTS[int(np.argmax(LABELS))]
    named = vectorizer.words_behind(text, model.coef_[0], count=3)
    assert {word for word, _ in named} <= {"kidney", "nephrectomy", "nephrectomy kidney"}
    # All shares, those that push the other way included, make up the scalar product.
    forth = sum(share for _, share in vectorizer.words_behind(text, model.coef_[0], count=10**6))
    back = sum(share for _, share in vectorizer.words_behind(text, -model.coef_[0], count=10**6))
    assert np.isclose(forth - back, float(vectorizer.transform([text])[0] @ model.coef_[0]), rtol=1e-3)


def test_the_same_from_disk_and_in_any_company(tmp_path: Path) -> None:
    vectorizer = TextVectorizer(width=16, seed=3).fit(TEXTS)
    save_file(vectorizer.to_arrays(), tmp_path / "text.safetensors")
    other = TextVectorizer.from_arrays(load_file(tmp_path / "text.safetensors"))
    np.testing.assert_array_equal(other.transform(TEXTS), vectorizer.transform(TEXTS))
    np.testing.assert_allclose(other.transform(TEXTS[5:6])[0], vectorizer.transform(TEXTS)[5], atol=1e-6)
    np.testing.assert_array_equal(TextVectorizer(width=16, seed=3).fit(TEXTS)._axes, vectorizer._axes)


def test_the_vocabulary_is_bounded_and_unknown_words_say_nothing() -> None:
    vectorizer = TextVectorizer(width=300, max_features=60).fit(TEXTS)
    assert len(vectorizer._words) == len(vectorizer._grams) == 30
    assert vectorizer.width <= 60
    np.testing.assert_array_equal(vectorizer.transform(["", "qqq"]), np.zeros((2, vectorizer.width)))


@pytest.mark.parametrize("texts", [["one report"] * 9, ["", "."]])
def test_too_little_text_is_said(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="reports: "):
        TextVectorizer().fit(texts)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights that knows the words of the reports."""
    import torch

    import_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()} | {"."})]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_any_encoder_of_transformers_serves(encoder_folder: Path) -> None:
    encoder = TransformersText(str(encoder_folder), batch_size=3).fit(TEXTS)
    vectors = encoder.transform(TEXTS)
    assert vectors.shape == (80, 16) == (80, encoder.width)
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(vectors.std(axis=0), 1, atol=1e-3)
    # Batches and company change nothing; reports beyond one window (32 tokens) are read to their end.
    np.testing.assert_allclose(encoder.transform(TEXTS[7:8])[0], vectors[7], atol=1e-4)
    assert np.abs(encoder.transform([TEXTS[0] + " kidney" * 20]) - vectors[0]).max() > 1e-2
    again = TransformersText.from_arrays(encoder.to_arrays())
    np.testing.assert_allclose(again.transform(TEXTS[:4]), vectors[:4], atol=1e-4)


def test_one_window_is_the_mean_of_hidden_states(encoder_folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    text = "the kidney shows tissue"
    tokens = AutoTokenizer.from_pretrained(encoder_folder)(text, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(encoder_folder)(**tokens).last_hidden_state[0].mean(dim=0).numpy()
    np.testing.assert_allclose(TransformersText(str(encoder_folder)).transform([text])[0], expected, atol=1e-5)


def test_sentences_behind_a_direction(encoder_folder: Path) -> None:
    encoder = TransformersText(str(encoder_folder))
    text = "the tissue was received . \nkidney nephrectomy kidney .\n all margins free ."
    direction = encoder.transform(["kidney nephrectomy kidney ."])[0] - encoder.transform(["all margins free ."])[0]
    assert encoder.words_behind(text, direction)[0][0].startswith("kidney")


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text encoder 'no/such-model' can't be loaded"):
        TransformersText("no/such-model")
    with pytest.raises(UsageError, match="can't be loaded"):
        TransformersText(str(tmp_path))
