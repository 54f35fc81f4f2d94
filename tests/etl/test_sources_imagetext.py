"""Pictures with captions: WebDataset tars as img2dataset writes them, by webdataset's own writer; layout, loss
mask, and a training run."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from etl import sources
from etl.sources import Rejection, SourceError
from schemas.layout import PATCH, TEXT, layout_of
from schemas.vocabulary import DISJOINT
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from tests.etl.logkit import TEXT as TEXT_MODEL
from tests.etl.logkit import build_here, episodes_of, reversed_scan, scans_of
from trainer.model import PRESETS, Gato

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def coded(picture, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form)
    return buffer.getvalue()


def squares(count, seed=0):
    """(picture, caption) of squares of one colour on noise."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name = list(COLOURS)[int(rng.integers(4))]
        picture = rng.integers(0, 40, (32, 32, 3), np.uint8)
        at = rng.integers(2, 14, 2)
        picture[at[0] : at[0] + 14, at[1] : at[1] + 14] = COLOURS[name]
        yield f"{number:09d}", picture, f"a picture of a {name} square"


def tars(folder, count=12, each=6, seed=0):
    """Tars as img2dataset's WebDatasetSampleWriter writes them; what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = list(squares(count, seed))
    for shard in range(0, count, each):
        with webdataset.TarWriter(str(folder / f"{shard // each:05d}.tar")) as writer:
            for key, picture, caption in kept[shard : shard + each]:
                about = json.dumps({"key": key, "caption": caption, "status": "success"})
                writer.write({"__key__": key, "png": coded(picture), "txt": caption, "json": about})
    return kept


def test_pairs_are_pictures_and_captions_in_order(tmp_path):
    kept = tars(tmp_path / "laion")
    scan, found = episodes_of("imagetext", tmp_path, picture_size=(32, 32))
    assert scan.task.name == "imagetext-laion" and not scan.rejected and len(found) == 12
    for pair, (_, picture, caption) in zip(found, kept, strict=True):
        assert np.array_equal(pair.observation["picture"][0], picture)
        assert pair.observation["caption"].tolist() == [caption]
    assert sources.load("imagetext").recognise(tmp_path).certainty == 1
    assert reversed_scan("imagetext", tmp_path, picture_size=(32, 32)) == [scan]


def test_sizes_channels_and_captions_of_json(tmp_path):
    rng = np.random.default_rng(0)
    grey, clear = rng.integers(0, 256, (20, 50), np.uint8), rng.integers(0, 256, (32, 32, 4), np.uint8)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "1", "jpg": coded(grey, "JPEG"), "json": json.dumps({"alt": "grey", "caption": "no"})})
        writer.write({"__key__": "2", "png": coded(clear), "json": json.dumps({"alt": "clear"})})
    _, found = episodes_of("imagetext", tmp_path, picture_size=(48, 32), caption_key="alt")
    assert [pair.observation["caption"][0] for pair in found] == ["grey", "clear"]
    assert {pair.observation["picture"].shape for pair in found} == {(1, 48, 32, 3)}
    first = found[0].observation["picture"][0]
    assert np.array_equal(first[..., 0], first[..., 2])
    _, found = episodes_of("imagetext", tmp_path, picture_size=(32, 32), caption_key="alt")
    seen = found[1].observation["picture"][0]
    share = clear[..., 3:] / 255
    assert np.abs(seen - (clear[..., :3] * share + 255 * (1 - share))).max() <= 1


def test_the_caption_is_the_target_and_the_picture_is_input(tmp_path):
    kept = tars(tmp_path / "in", count=30, each=10)
    build_here("imagetext", tmp_path / "in", tmp_path / "out", picture_size=(32, 32), caption_tokens=12)
    dataset = verify(tmp_path / "out", full=True)
    (task,), text = dataset.manifest.tasks, TEXT_MODEL
    layout = layout_of(task.spec)
    assert layout.captioned and layout.roles.tolist() == [PATCH] * 4 + [TEXT] * 12
    stream = Stream([tmp_path / "out"], StreamConfig(sequence_length=40), seed=0)
    batch = stream.batch(0, 4)
    known = {caption for _, _, caption in kept}
    for row in range(4):
        at = np.flatnonzero(batch.positions[row] == 0)
        assert np.diff(at).tolist() == [16, 16] and batch.segments[row, at].tolist() == [0, 1, 2]
        own = slice(at[0], at[0] + 16)
        tokens, supervised = batch.tokens[row, own].copy(), batch.supervised[row, own]
        assert text.decode(tokens[4:]) in known
        real = tokens != dataset.manifest.text_model.padding
        assert supervised.tolist() == [False] * 4 + real[4:].tolist() and 5 < supervised.sum() < 12
        assert tokens[4:][supervised[4:]][-1] == text.processor.eos_id() + text.ids.start
    assert task.cut_texts == 0 and (batch.roles[batch.supervised] == TEXT).all()


def repacked(path, change):
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            data = change(member.name, data)
            if data is not None:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("reason", "ending", "data"),
    [
        ("missing key", "png", None),
        ("corrupt picture", "png", b"\x89PNG\r\n\x1a\n"),
        ("not UTF-8", "txt", b"\xff\xfe"),
        ("empty", "txt", b"  \n"),
    ],
)
def test_one_damaged_pair(tmp_path, reason, ending, data):
    tars(tmp_path / "in")
    repacked(tmp_path / "in" / "00000.tar", lambda name, old: data if name == f"000000002.{ending}" else old)
    _, found = episodes_of("imagetext", tmp_path / "in", picture_size=(32, 32))
    assert [(one.position, one.reason) for one in found if isinstance(one, Rejection)] == [(2, reason)]


def test_truncated_and_foreign_tars(tmp_path):
    tars(tmp_path / "in")
    path = tmp_path / "in" / "00000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    (tmp_path / "in" / "x.tar").write_bytes(b"no tar" * 1000)
    scan, found = episodes_of("imagetext", tmp_path / "in", picture_size=(32, 32))
    assert {(line.file, line.reason) for line in scan.rejected} <= {
        ("00000.tar", "truncated tar"), ("00000.tar", "corrupt tar"), ("x.tar", "corrupt tar")
    } and len(scan.rejected) == 2  # fmt: skip
    assert sum(not isinstance(one, Rejection) for one in found) >= 6
    (scan,) = scans_of("imagetext", tmp_path / "in" / "x.tar")
    assert scan.task is None
    with pytest.raises(SourceError, match="img2dataset"):
        sources.load("imagetext").resolve(None, None, tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        sources.load("imagetext").options(picture_size=(100, 100)).check()


def test_a_caption_sees_its_picture_and_not_the_other_way_round(tmp_path):
    tars(tmp_path / "in", count=8, each=8)
    build_here("imagetext", tmp_path / "in", tmp_path / "out", picture_size=(32, 32), caption_tokens=12)
    stream = Stream([tmp_path / "out"], StreamConfig(sequence_length=16), seed=0)
    config = replace(PRESETS["tiny"], blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)
    model = Gato(config, DISJOINT).initialise(0).eval()
    batch = stream.batch(0, 1).to("cpu")
    captions, pictures = (batch.roles[0] == role for role in (TEXT, PATCH))
    with torch.no_grad():
        before = model(batch)[0]
        seen = model(replace(batch, patches=255 - batch.patches))[0]
        read = model(replace(batch, tokens=torch.where(batch.roles == TEXT, batch.tokens[:, -1:], batch.tokens)))[0]
    assert not torch.isclose(before[captions], seen[captions]).all(dim=1).any()
    assert torch.equal(before[pictures], read[pictures]) and not torch.equal(before[captions], read[captions])


@pytest.mark.process
def test_the_trainer_learns_captions(tmp_path):
    from tests.trainer.launch import metrics_at, train

    tars(tmp_path / "in", count=200, each=100)
    build_here("imagetext", tmp_path / "in", tmp_path / "out", picture_size=(32, 32), caption_tokens=10)
    given = "--optimiser.peak-lr 4e-3 --optimiser.warmup-steps 5 --run.evaluate-every 30 --run.save-every 30"
    train(tmp_path / "run", [tmp_path / "out"], *given.split(), steps=30)
    first, last = (metrics_at(tmp_path / "run", step)["held_out/imagetext-in/loss"] for step in (0, 30))
    assert first > 9 and last < 0.3 * first  # from ln 34,049 on


def test_a_damaged_header_is_no_end_and_long_names_are_read(tmp_path):
    kept = tars(tmp_path / "in", count=6)
    path = tmp_path / "in" / "00000.tar"
    with tarfile.open(path) as archive:
        start = archive.getmembers()[9].offset
    data = bytearray(path.read_bytes())
    data[start + 150] ^= 1
    (tmp_path / "damaged.tar").write_bytes(data)
    (scan,) = scans_of("imagetext", tmp_path / "damaged.tar")
    assert [(line.position, line.reason) for line in scan.rejected] == [(2, "corrupt tar")]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as archive:
            for folder in ("a", "b" * 120, "c", f"ü{form}", "a"):
                for ending, data in (("png", coded(kept[0][1])), ("txt", f"of {folder}".encode())):
                    member = tarfile.TarInfo(f"{folder}/1.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            archive.addfile(tarfile.TarInfo("nothing"))
        _, found = episodes_of("imagetext", tmp_path / "long.tar", picture_size=(32, 32))
        captions = [pair.observation["caption"][0] for pair in found]
        assert captions == ["of a", f"of {'b' * 120}", "of c", f"of ü{form}", "of a"]
