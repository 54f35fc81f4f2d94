"""Texts in the three formats: each document there once, in order, decoded to itself; bad ones named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from etl.tokenizers.text import DEFAULT_MODEL, TextTokenizer
from schemas.dataset import load_manifest
from schemas.vocabulary import DISJOINT
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from tests.conftest import run

TEXTS = [f"Document {n}: the quick brown fox jumps over {n * n} lazy dogs, naïve or not. 漢字 🦊" for n in range(60)]


def write(path, texts=TEXTS, **columns):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7)
    else:
        path.write_text("\n\n\n".join(texts) + "\n")
    return path


def build(source, output, *flags, **kwargs):
    return run("etl.build", "--source", "text", "--input", source, "--output", output, *flags, **kwargs)


def documents(folder):
    dataset = Dataset(folder)
    text = TextTokenizer(folder / "text.model", dataset.manifest.vocabulary)
    order = np.lexsort((dataset.column("start"), dataset.column("episode")))
    return [text.decode(dataset.tokens(int(row))[:-1, 0]) for row in order]  # without the end-of-text piece


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_every_document_comes_back(tmp_path, suffix):
    write(tmp_path / f"corpus{suffix}")
    build(tmp_path / f"corpus{suffix}", tmp_path / "d", "--shard-megabytes", "0.05")
    manifest = load_manifest(tmp_path / "d")
    assert documents(tmp_path / "d") == TEXTS and manifest.shards.rows > 2
    assert manifest.text_model.file.sha256 == TextTokenizer(DEFAULT_MODEL, DISJOINT).fingerprint
    assert manifest.text_model.pieces == 32_000 and manifest.tasks[0].spec.action is None


def test_bad_documents_are_lines_of_rejected(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[3], lines[5], lines[8], lines[9] = "{not json", '{"body": "x"}', '{"text": "  "}', '{"text": "\\ud800"}'
    (tmp_path / "c.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    build(tmp_path / "c.jsonl", tmp_path / "d")
    found = [json.loads(line) for line in (tmp_path / "d" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["position"], r["reason"]) for r in found] == [
        (3, "not JSON"), (5, "missing key"), (8, "empty"), (9, "not UTF-8"), (60, "not UTF-8"),
    ]  # fmt: skip
    assert len(documents(tmp_path / "d")) == 56


def test_a_damaged_parquet_file_beside_a_good_one(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write(source / "a.parquet")
    (source / "b.parquet").write_bytes((source / "a.parquet").read_bytes()[:-40])
    done = build(source, tmp_path / "d")
    assert "b.parquet" in done.stderr and len(documents(tmp_path / "d")) == 60


def test_wrong_input_is_explained(tmp_path):
    write(tmp_path / "c.parquet")
    done = build(tmp_path / "c.parquet", tmp_path / "d", "--text-field", "body", check=False)
    assert done.returncode == 1 and "--text-field" in done.stderr and "id, text" in done.stderr
    (tmp_path / "c.csv").write_text("a,b")
    done = build(tmp_path / "c.csv", tmp_path / "d", check=False)
    assert done.returncode == 1 and ".jsonl" in done.stderr
    done = build(write(tmp_path / "c.txt"), tmp_path / "d", "--text-model", tmp_path / "c.txt", check=False)
    assert done.returncode == 1 and "not a SentencePiece model" in done.stderr


def test_a_trained_tokenizer_is_kept_and_the_same_each_time(tmp_path):
    source = write(tmp_path / "c.jsonl", TEXTS * 3)
    flags = ("--train-tokenizer", "--tokenizer-pieces", "340")
    for name in "de":
        build(source, tmp_path / name, *flags)
    one, two = (load_manifest(tmp_path / name) for name in "de")
    assert one.text_model.pieces == 340 and one.text_model == two.text_model
    assert documents(tmp_path / "d")[:60] == TEXTS


def test_the_stream_packs_documents_and_supervises_them(tmp_path):
    build(write(tmp_path / "c.txt"), tmp_path / "d")
    stream = Stream([tmp_path / "d"], StreamConfig(sequence_length=128), seed=0)
    sequence = stream.sequence(5)
    segments = sequence.segments[0]
    starts = np.concatenate([[True], segments[1:] != segments[:-1]])
    assert len(np.unique(segments)) > 1
    assert (sequence.supervised[0] == ~starts).all() and (sequence.tokens < 32_000).all()
