"""Reports as vectors: n-grams reduced by a singular value decomposition, or any transformers encoder by name."""

import importlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, hstack
from sklearn.preprocessing import normalize

from pathopipe.embeddings.torchvision_import import import_torchvision
from pathopipe.errors import UsageError

__all__ = ["NGRAMS", "TextEncoder", "TextVectorizer", "TransformersText"]

NGRAMS: Final = "ngrams"
"""Name of the text encoder that needs no download."""

Counts = Counter[str]

_TOKEN: Final = re.compile(r"[^\W_]+")
_GRAMS: Final = (3, 4, 5)
# Longer words are what scanning ran together.
_LONGEST_WORD: Final = 40
_FIT_TEXTS: Final = 4000
_BATCH: Final = 256
# Of a vocabulary that grew beyond this, what was met once so far is forgotten.
_MOST_HELD: Final = 2_000_000
_WINDOW_TOKENS: Final = 512


class TextEncoder(Protocol):
    """What turns reports into vectors."""

    @property
    def width(self) -> int:
        """Numbers a text."""

    def fit(self, texts: Sequence[str]) -> "TextEncoder":
        """Learn from the training texts alone; returns itself."""

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts as vectors, (n, width)."""

    def words_behind(self, text: str, direction: NDArray[Any], *, count: int = 10) -> list[tuple[str, float]]:
        """What in a text pushes its vector most along a direction (width,), strongest first, with its share."""

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learnt, as numeric arrays."""


# --- n-grams -----------------------------------------------------------------------------------------------------


class TextVectorizer:
    """TF-IDF of words, pairs of words and 3 to 5 letters within a word, reduced to at most ``width`` numbers.

    Words and letters are two blocks of equal length. The reduction is a truncated singular value decomposition, so that
    the vector of a text is a sum over its n-grams, which :meth:`words_behind` takes apart; lengths are scaled to a mean
    square of one a number. The vocabulary is learnt from at most 4,000 different texts and holds ``max_features``
    n-grams; memory does not grow with the number of texts beyond that.

    Source: Deerwester et al. 1990, Indexing by latent semantic analysis, J. Am. Soc. Inf. Sci. 41, 391.
    """

    def __init__(self, *, width: int = 256, max_features: int = 20_000, seed: int = 0) -> None:
        self.max_width = width
        self.max_features = max_features
        self.seed = seed
        self._words: dict[str, int] = {}
        self._grams: dict[str, int] = {}
        self._idf = np.zeros(0, np.float32)
        self._axes = np.zeros((0, 0), np.float32)

    @property
    def width(self) -> int:
        """Numbers a text; fewer than asked for where there are few texts."""
        return len(self._axes)

    def fit(self, texts: Sequence[str]) -> "TextVectorizer":
        """Learn vocabulary, weights and axes from the training texts alone; returns itself.

        Raises:
            UsageError: Fewer than two different texts, or no word in them.
        """
        distinct = list(dict.fromkeys(texts))
        if len(distinct) > _FIT_TEXTS:
            chosen = np.random.default_rng(self.seed).permutation(len(distinct))[:_FIT_TEXTS]
            distinct = [distinct[number] for number in np.sort(chosen)]
        if len(distinct) < 2:
            raise UsageError(f"reports: {len(distinct)} different texts in the training part; text needs two or more")
        self._words = _frequent((set(_words_of(text)) for text in distinct), self.max_features // 2, len(distinct))
        self._grams = _frequent(_gram_sets(distinct), self.max_features - self.max_features // 2, len(distinct))
        if not self._words:
            raise UsageError("reports: no word stands in two of the training texts; check that they are text")
        self._idf = np.ones(len(self._words) + len(self._grams), np.float32)
        counts = self._counts(distinct)
        in_texts = np.asarray((counts > 0).sum(axis=0), np.float64).ravel()
        self._idf = (np.log((1 + len(distinct)) / (1 + in_texts)) + 1).astype(np.float32)
        weights = self._weigh(counts)
        self._axes = _principal_axes(weights, self.max_width)
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts as vectors, (n, width); zeros where no word is known."""
        places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        distinct = list(places)
        vectors = np.zeros((len(distinct), self.width), np.float32)
        for start in range(0, len(distinct), _BATCH):
            batch = distinct[start : start + _BATCH]
            vectors[start : start + len(batch)] = self._weigh(self._counts(batch)) @ self._axes.T
        return vectors[[places[text] for text in texts]]

    def words_behind(self, text: str, direction: NDArray[Any], *, count: int = 10) -> list[tuple[str, float]]:
        """Words and pairs of words that push a text's vector most along a direction, strongest first.

        Args:
            text: The report.
            direction: (width,), a class's weights in a linear head for example.
            count: Most that are named.

        Returns:
            Words with their shares of the scalar product of vector and direction; letters count for the words that they
            stand in. Those that push the other way are left out.
        """
        weights = self._weigh(self._counts([text]))
        pushes = weights.toarray()[0] * (np.asarray(direction, np.float32) @ self._axes)
        shares: dict[str, float] = {}
        for name in _words_of(text):
            if name in self._words:
                shares[name] = float(pushes[self._words[name]])
        tokens = _tokens_of(text)
        in_text = _grams_of(tokens)
        for name, times in tokens.items():
            for gram, of_word in _grams_of({name: times}).items():
                if gram in self._grams:
                    push = float(pushes[len(self._words) + self._grams[gram]])
                    shares[name] = shares.get(name, 0.0) + push * of_word / in_text[gram]
        ranked = sorted(((name, share) for name, share in shares.items() if share > 0), key=lambda of: (-of[1], of[0]))
        return ranked[:count]

    def _counts(self, texts: Sequence[str]) -> csr_matrix:
        """(n, n-grams) how often each stands in each text; words first, then letters."""
        tokens = [_tokens_of(text) for text in texts]
        # Letters within a word are those of the word wherever it stands, so each word is taken apart once.
        known = {name: number for number, name in enumerate(dict.fromkeys(name for of in tokens for name in of))}
        spelt = _matrix((_grams_of({name: 1}) for name in known), self._grams)
        letters = _matrix(tokens, known) @ spelt
        return csr_matrix(hstack([_matrix(map(_words_of, texts), self._words), letters], format="csr"))

    def _weigh(self, counts: csr_matrix) -> csr_matrix:
        """TF-IDF with the logarithm of the counts, both blocks of equal length."""
        weights = counts.astype(np.float32)
        weights.data = 1 + np.log(weights.data)
        weights = csr_matrix(weights.multiply(self._idf[None, :]))
        split = len(self._words)
        blocks = [normalize(block) for block in (weights[:, :split], weights[:, split:])]
        return csr_matrix(hstack(blocks, format="csr"))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learnt, as numeric arrays (the vocabulary as UTF-8 bytes), ready for safetensors."""
        return {
            "settings": np.asarray([self.max_width, self.max_features, self.seed], np.int64),
            "words": _as_bytes(self._words),
            "grams": _as_bytes(self._grams),
            "idf": self._idf,
            "axes": self._axes,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "TextVectorizer":
        """The reverse of :meth:`to_arrays`."""
        width, max_features, seed = (int(value) for value in arrays["settings"])
        made = cls(width=width, max_features=max_features, seed=seed)
        made._words, made._grams = (
            {name: number for number, name in enumerate(_from_bytes(arrays[key]))} for key in ("words", "grams")
        )
        made._idf, made._axes = np.asarray(arrays["idf"], np.float32), np.asarray(arrays["axes"], np.float32)
        return made


def _principal_axes(weights: csr_matrix, most: int) -> NDArray[np.float32]:
    """(d, n-grams) right singular vectors of (n, n-grams), scaled so that coordinates have a mean square of one.

    By way of the (n, n) products, which is exact and quicker than random projections for a few thousand texts.
    """
    products = (weights @ weights.T).toarray().astype(np.float64)
    squares, left = eigh(products, subset_by_index=(max(0, len(products) - most), len(products) - 1))
    squares, left = squares[::-1], left[:, ::-1]
    real = squares > 1e-6 * squares[0]
    strength = np.sqrt(squares[real])
    axes = (weights.T @ (left[:, real] / strength)).T
    # A singular vector may point either way; it is turned so that its largest number is positive.
    turned = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    size = np.sqrt(squares[real].mean() / len(products))
    return np.ascontiguousarray(turned / size, np.float32)


def _tokens(text: str) -> list[str]:
    return [token[:_LONGEST_WORD] for token in _TOKEN.findall(text.casefold())]


def _tokens_of(text: str) -> Counts:
    return Counter(_tokens(text))


def _words_of(text: str) -> Counts:
    tokens = _tokens(text)
    counts = Counter(tokens)
    counts.update(f"{first} {second}" for first, second in itertools.pairwise(tokens))
    return counts


def _grams_of(words: Mapping[str, int]) -> Counts:
    """Runs of letters in words with a space on either side, as often as their words stand there."""
    counts: Counts = Counter()
    for word, times in words.items():
        padded = f" {word} "
        for length in _GRAMS:
            for start in range(len(padded) - length + 1):
                counts[padded[start : start + length]] += times
    return counts


def _gram_sets(texts: Sequence[str]) -> Iterator[set[str]]:
    """The runs of letters in each text."""
    of_word: dict[str, tuple[str, ...]] = {}
    for text in texts:
        found: set[str] = set()
        for word in _tokens_of(text):
            if word not in of_word:
                of_word[word] = tuple(_grams_of({word: 1}))
            found.update(of_word[word])
        yield found


def _frequent(names: Iterator[set[str]], most: int, n: int) -> dict[str, int]:
    """The n-grams in most texts, numbered in alphabetical order; in two texts or more unless there are few."""
    in_texts: Counts = Counter()
    for of in names:
        in_texts.update(of)
        if len(in_texts) > _MOST_HELD:
            in_texts = Counter({name: count for name, count in in_texts.items() if count > 1})
    least = 2 if n >= 10 else 1
    ranked = sorted(
        (name for name, count in in_texts.items() if count >= least), key=lambda name: (-in_texts[name], name)
    )
    return {name: number for number, name in enumerate(sorted(ranked[:most]))}


def _matrix(counts: Iterator[Counts] | Sequence[Counts] | Any, names: Mapping[str, int]) -> csr_matrix:
    columns: list[int] = []
    values: list[int] = []
    ends = [0]
    for of in counts:
        for name, count in of.items():
            number = names.get(name)
            if number is not None:
                columns.append(number)
                values.append(count)
        ends.append(len(columns))
    shape = (len(ends) - 1, len(names))
    return csr_matrix((np.asarray(values, np.float32), np.asarray(columns, np.int32), ends), shape=shape)


def _as_bytes(names: Mapping[str, int]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join(names).encode("utf-8"), np.uint8)


def _from_bytes(array: NDArray[Any]) -> list[str]:
    return np.asarray(array, np.uint8).tobytes().decode("utf-8").split("\n") if len(array) else []


# --- transformers ------------------------------------------------------------------------------------------------


class TransformersText:
    """Mean of the last hidden states of a transformers encoder over all tokens of a report, standardised.

    Longer reports are read in windows of 512 tokens, or of as many as the model takes.
    """

    def __init__(
        self, name_or_folder: str, *, allow_download: bool = False, batch_size: int = 8, device: str = "cpu"
    ) -> None:
        """Load model and tokenizer.

        Args:
            name_or_folder: A folder with both, or the model's name on the hub, looked up among what was downloaded.
            allow_download: Fetch it where it is not there yet.
            batch_size: Windows the model sees at once.
            device: Where it runs.

        Raises:
            UsageError: transformers is not installed, or there is no such model.
        """
        import_torchvision()  # transformers imports it on its way to a model
        try:
            transformers = importlib.import_module("transformers")
        except ImportError:
            raise UsageError(
                f"text encoder '{name_or_folder}': install transformers (pip install transformers)"
            ) from None
        is_local = Path(name_or_folder).is_dir() or not allow_download
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name_or_folder, local_files_only=is_local)
            # Only safetensors: other weight files can carry code.
            self._model: Any = transformers.AutoModel.from_pretrained(
                name_or_folder, local_files_only=is_local, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"text encoder '{name_or_folder}' can't be loaded ({' '.join(str(error).split())[:200]}); "
                "give the folder that it was saved to (config.json, model.safetensors and the tokenizer's files)"
            ) from None
        self._model.eval().to(device)
        self._name = name_or_folder
        self._batch_size = batch_size
        self._device = device
        longest = (self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", None))
        self._window = min([_WINDOW_TOKENS, *(of for of in longest if of)])
        self._mean = np.zeros(self.width, np.float32)
        self._std = np.ones(self.width, np.float32)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self._model.config.hidden_size)

    def fit(self, texts: Sequence[str]) -> "TransformersText":
        """Learn the mean and spread of each number from the training texts alone; returns itself."""
        vectors = self._embed(list(dict.fromkeys(texts)))
        spread = vectors.std(axis=0)
        self._mean = vectors.mean(axis=0)
        # A number that hardly differs between texts would be blown-up rounding.
        self._std = np.where(spread > 1e-5 * np.abs(vectors).max(), spread, 1).astype(np.float32)
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts as vectors, (n, width)."""
        places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        vectors = (self._embed(list(places)) - self._mean) / self._std
        return np.asarray(vectors[[places[text] for text in texts]], np.float32)

    def words_behind(self, text: str, direction: NDArray[Any], *, count: int = 10) -> list[tuple[str, float]]:
        """Sentences whose absence takes most from the scalar product of vector and direction (width,)."""
        sentences = [part for part in re.split(r"(?<=[.!?;])\s+|\n+", text) if part.strip()]
        if len(sentences) < 2:
            return []
        without = [" ".join(sentences[:number] + sentences[number + 1 :]) for number in range(len(sentences))]
        pushes = self.transform([text, *without]) @ np.asarray(direction, np.float32)
        shares = pushes[0] - pushes[1:]
        order = np.argsort(-shares, kind="stable")[:count]
        return [(sentences[number], float(shares[number])) for number in order if shares[number] > 0]

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        sums = np.zeros((len(texts), self.width), np.float32)
        tokens = np.zeros((len(texts), 1), np.float32)
        for start in range(0, len(texts), _BATCH):
            encoded = self._tokenizer(
                list(texts[start : start + _BATCH]),
                truncation=True,
                max_length=self._window,
                return_overflowing_tokens=True,
                padding=True,
                return_tensors="pt",
            )
            of_text = encoded["overflow_to_sample_mapping"].numpy() + start
            for first in range(0, len(of_text), self._batch_size):
                part = slice(first, first + self._batch_size)
                real = encoded["attention_mask"][part].to(self._device)
                with torch.inference_mode():
                    hidden = self._model(input_ids=encoded["input_ids"][part].to(self._device), attention_mask=real)
                states = hidden.last_hidden_state.float() * real[..., None]
                np.add.at(sums, of_text[part], states.sum(dim=1).cpu().numpy())
                np.add.at(tokens, of_text[part], real.sum(dim=1, keepdim=True).float().cpu().numpy())
        return np.asarray(sums / np.maximum(tokens, 1), np.float32)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The model's name or folder and the scale; its weights stay where they are."""
        name = np.frombuffer(self._name.encode("utf-8"), np.uint8)
        return {"name": name, "mean": self._mean, "std": self._std}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], *, allow_download: bool = False, device: str = "cpu"
    ) -> "TransformersText":
        """The reverse of :meth:`to_arrays`.

        Raises:
            UsageError: The model is not there any more.
        """
        name = np.asarray(arrays["name"], np.uint8).tobytes().decode("utf-8")
        made = cls(name, allow_download=allow_download, device=device)
        made._mean, made._std = np.asarray(arrays["mean"], np.float32), np.asarray(arrays["std"], np.float32)
        return made
