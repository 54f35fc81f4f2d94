"""Text <-> SentencePiece tokens in the text range (paper §2.1: 32,000 pieces).

A model of 32,000 pieces with byte fallback ships next to this file; `train` makes another one.

Invariant: a text that is not cut decodes to itself, up to SentencePiece's normalisation of blanks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from schemas.vocabulary import Vocabulary

DEFAULT_MODEL = Path(__file__).resolve().parent / "mistral-32000.model"


class TextTokenizer:
    """A SentencePiece model: a file, or its bytes. ValueError if it is not one, or has more pieces than
    the vocabulary's text range."""

    def __init__(self, model: Path | bytes, vocabulary: Vocabulary):
        where = "the text model" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise ValueError(f"{model}: no SentencePiece model there; give --text-model a .model file")
            model = Path(model).read_bytes()
        self.bytes = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.processor.encode("a")
        except RuntimeError:
            raise ValueError(f"{where}: not a SentencePiece model; give --text-model a .model file") from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.ids = vocabulary.text
        if self.pieces > self.ids.size:
            raise ValueError(f"{where}: {self.pieces} pieces, the vocabulary has room for {self.ids.size}")

    @property
    def pieces(self) -> int:
        return self.processor.vocab_size()

    @property
    def padding(self) -> int:
        """Token that fills a text up to its length: the model's unknown piece."""
        return self.processor.unk_id() + self.ids.start

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Tokens uint16 (N,); cut or padded to `length` where given."""
        pieces = self.processor.encode(text)
        if length is not None:
            pieces = (pieces + [self.processor.unk_id()] * length)[:length]
        return (np.array(pieces, np.int64) + self.ids.start).astype(np.uint16)

    def encode_lines(self, lines: np.ndarray, length: int, end: bool = False) -> tuple[np.ndarray, int]:
        """Strings (T,) to tokens uint16 (T, length), and how many strings were cut. Equal lines cost once. `end`: each
        is followed by the model's end-of-text piece, if it has one."""
        unique, inverse = (lines, np.zeros(1, int)) if len(lines) == 1 else np.unique(lines, return_inverse=True)
        last = [self.processor.eos_id()] if end and self.processor.eos_id() >= 0 else []
        pieces = [self.processor.encode(str(line)) + last for line in unique]
        cut = np.array([len(p) > length for p in pieces], bool)
        padded = [(p + [self.processor.unk_id()] * length)[:length] for p in pieces]
        return (np.array(padded, np.int64) + self.ids.start).astype(np.uint16)[inverse], int(cut[inverse].sum())

    def encode_document(self, text: str) -> np.ndarray:
        """Tokens uint16 (N,) of a document, followed by the model's end-of-text piece, if it has one."""
        end = [self.processor.eos_id()] if self.processor.eos_id() >= 0 else []
        return (np.array(self.processor.encode(text) + end, np.int64) + self.ids.start).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> str:
        pieces = [int(t) - self.ids.start for t in tokens]
        return self.processor.decode([p for p in pieces if p != self.processor.unk_id()])


def train(texts: Iterator[str], pieces: int, characters: int = 50_000_000) -> bytes:
    """A SentencePiece model (unigram, byte fallback) of `pieces` pieces from the first `characters` of `texts`.
    ValueError where the texts are too few for that many. A function of its arguments: one thread, fixed sampling."""
    from io import BytesIO

    def sentences() -> Iterator[str]:
        seen = 0
        for text in texts:
            for line in text.splitlines():
                yield line[:4096]
                seen += len(line)
            if seen > characters:
                return

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, vocab_size=pieces, model_type="unigram",
            byte_fallback=True, num_threads=1, input_sentence_size=2_000_000, shuffle_input_sentence=False,
            max_sentence_length=16384, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"cannot train {pieces} pieces on this text ({str(error).splitlines()[-1][-120:]}); "
            "give more text, or fewer --tokenizer-pieces"
        ) from None
    return model.getvalue()
