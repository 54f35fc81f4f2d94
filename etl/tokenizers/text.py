"""Text <-> SentencePiece tokens in the text range (paper §2.1: 32,000 pieces)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import sentencepiece

from schemas.vocabulary import Vocabulary


class TextTokenizer:
    """A SentencePiece model file. ValueError if it has more pieces than the vocabulary's text range."""

    def __init__(self, path: Path, vocabulary: Vocabulary):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no SentencePiece model there; give --text-model a .model file")
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.ids = vocabulary.text
        if self.processor.vocab_size() > self.ids.size:
            raise ValueError(
                f"{path}: {self.processor.vocab_size()} pieces, the vocabulary has room for {self.ids.size}"
            )

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Tokens uint16 (N,); cut or padded with the model's unknown piece to `length` where given."""
        pieces = self.processor.encode(text)
        if length is not None:
            pieces = (pieces + [self.processor.unk_id()] * length)[:length]
        return (np.array(pieces, np.int64) + self.ids.start).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> str:
        pieces = [int(t) - self.ids.start for t in tokens]
        return self.processor.decode([p for p in pieces if p != self.processor.unk_id()])
