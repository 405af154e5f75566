"""Encode a text column: TF-IDF of its words, reduced by a truncated SVD.

Words are runs of letters and digits, lower case; the vocabulary is the 20,000 most frequent ones,
counts are damped (1 + log). Fitted on a sample of about 50,000 texts, held in memory with their
TF-IDF matrix (5 s on one core); then encodes any number in batches, 70,000 titles a second. The
width is always ``dim``: components that a small vocabulary cannot fill stay zero. Scripts that do
not separate words by spaces are not segmented.
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.items.column_choice import ColumnKind
from hiertcn.items.column_encodings import Block, Known
from hiertcn.items.hashed_encodings import not_blank, plain_texts

_log = logging.getLogger(__name__)

_VOCABULARY: Final = 20_000
_FITTED_TEXTS: Final = 50_000
_WORD: Final = r"(?u)\b\w+\b"


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """TF-IDF over ``vocabulary``, projected on ``components`` float32 [dim, vocabulary]."""

    kind: ClassVar[ColumnKind] = "text"
    column: str
    vocabulary: list[str]
    idf: NDArray[np.float64]
    components: NDArray[np.float32]

    @property
    def width(self) -> int:
        """Number of components."""
        return len(self.components)

    def feature_names(self) -> list[str]:
        """Return ``column:svd[0]`` and so on."""
        return [f"{self.column}:svd[{k}]" for k in range(self.width)]

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """See :class:`ColumnEncoding`; a text without a known word counts as no value."""
        texts = plain_texts(values).fill_null("").to_pylist()
        weights = self._vectorizer.transform(texts)
        known = np.diff(weights.indptr) > 0
        block = np.asarray(weights[known] @ self.components.T, np.float32)
        return block.reshape(-1, self.width), known

    def settings(self) -> dict[str, Any]:
        """See :class:`ColumnEncoding`."""
        return {"vocabulary": self.vocabulary}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`ColumnEncoding`."""
        return {"idf": self.idf, "components": self.components}

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        return vectorizer


@dataclass(kw_only=True)
class TextFitter:
    """Fits a :class:`TextEncoding`."""

    column: str
    dim: int
    seed: int
    expected_items: int
    _texts: list[str] = field(default_factory=list)
    _batches: int = 0

    def observe(self, values: pa.Array, ids: pa.Array) -> None:
        """See :class:`ColumnFitter`."""
        texts = plain_texts(values)
        share = min(1.0, _FITTED_TEXTS / max(1, self.expected_items))
        random = np.random.default_rng([self.seed, self._batches])
        self._batches += 1
        taken = not_blank(texts) & (random.random(len(texts)) < share)
        self._texts += texts.filter(pa.array(taken)).to_pylist()

    def finish(self) -> TextEncoding | None:
        """See :class:`ColumnFitter`; None also if no text holds a word."""
        # Here, because importing scikit-learn takes seconds that readers of features need not wait.
        from sklearn.utils.extmath import randomized_svd

        vectorizer = _vectorizer(max_features=_VOCABULARY)
        analyze = vectorizer.build_analyzer()
        texts = [text for text in self._texts if analyze(text)]
        if not texts:
            return None
        weights = vectorizer.fit_transform(texts)
        found = min(self.dim, *weights.shape)
        _log.info("reducing %d words of %d texts in %r", weights.shape[1], len(texts), self.column)
        _, _, directions = randomized_svd(weights, found, n_iter=5, random_state=self.seed)
        projected = weights @ directions.T
        # Over all ``dim`` features, the zero ones too, so that every text block weighs the same.
        size = np.sqrt(np.square(projected).sum() / (len(texts) * self.dim))
        components = np.zeros((self.dim, weights.shape[1]), np.float32)
        components[:found] = directions / size
        return TextEncoding(
            column=self.column,
            vocabulary=vectorizer.get_feature_names_out().tolist(),
            idf=vectorizer.idf_,
            components=components,
        )


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=_WORD, sublinear_tf=True, **options)
