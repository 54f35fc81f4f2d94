import json
from dataclasses import replace

import numpy as np
import pytest

from schemas.dataset import DatasetError, load_manifest
from schemas.episode import ActionSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec
from schemas.layout import ACTION, OBSERVATION, PATCH, SEPARATOR, TEXT, Picture, TimestepLayout, layout_of
from schemas.vocabulary import DISJOINT, PAPER, VocabularyMismatch

HOPPER = TaskSpec("h", "d4rl", (FieldSpec("observation", "continuous", (2,)),), ActionSpec.continuous(-1.0, 1.0, 3))


def test_seed_vocabulary_is_the_documented_one():
    assert (DISJOINT.size, DISJOINT.padded_size, DISJOINT.separator) == (34049, 34176, 34048)
    assert (DISJOINT.observation_continuous.start, DISJOINT.observation_continuous.stop) == (32000, 33024)
    assert (DISJOINT.action_continuous.start, DISJOINT.action_continuous.stop) == (33024, 34048)
    with pytest.raises(VocabularyMismatch, match="rebuild it with --vocabulary disjoint"):
        DISJOINT.require(PAPER.fingerprint, "x")


def test_patch_positions_match_the_papers_worked_example():
    layout = TimestepLayout(0, (Picture(4, 5, 1),), 0, 1)  # 64 rows x 80 columns of pixels
    assert layout.patch_intervals[7].tolist() == [[32, 64], [51, 77]]
    assert layout.patch_centres[7].tolist() == [48, 64]
    assert layout.patch_intervals.max() == 128  # an exclusive end: the last row's largest bin is 127


def test_layout_order_and_length():
    layout = TimestepLayout(text=2, pictures=(Picture(1, 2, 3),), observation=3, action=2)
    assert layout.roles.tolist() == [TEXT] * 2 + [PATCH] * 2 + [OBSERVATION] * 3 + [SEPARATOR] + [ACTION] * 2
    assert layout.stored_columns.tolist() == [0, 1, 4, 5, 6, 8, 9]
    assert layout.length == 10 and layout.stored == 7
    assert layout_of(replace(HOPPER, action=None)).length == 2  # no action, no separator


def episode(**changes) -> RawEpisode:
    base = {
        "observation": {"observation": np.zeros((4, 2), np.float32)},
        "action": np.zeros((4, 3), np.float32),
        "reward": np.zeros(4, np.float32),
    }
    return RawEpisode(**(base | changes), terminated=True, truncated=False, file="f", position=0)


def test_actions_out_of_reach_are_refused_in_each_dimension():
    """Ranges [-1, 1] and [0, 4] reach to 100 and to 2 ± 200; the reference is the definition, value by value."""
    task = replace(HOPPER, action=ActionSpec.continuous((-1.0, 0.0), (1.0, 4.0), 2))
    for first in (0.0, 99.0, -100.0, 101.0, -150.0):
        for second in (2.0, 150.0, -150.0, 202.0, 203.0, -199.0):
            action = np.zeros((4, 2), np.float32)
            action[2] = first, second
            if abs(first) <= 100 and abs(second - 2) <= 200:
                episode(action=action).check(task)
            else:
                with pytest.raises(EpisodeError, match="from the middle"):
                    episode(action=action).check(task)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reward": np.zeros(0, np.float32)}, "empty"),
        ({"observation": {"observation": np.full((4, 2), np.nan, np.float32)}}, "not finite"),
        ({"observation": {"observation": np.zeros((3, 2), np.float32)}}, "wrong length"),
        ({"observation": {"observation": np.zeros((4, 5), np.float32)}}, "wrong shape"),
        ({"observation": {}}, "missing key"),
        ({"action": np.zeros((4, 3), np.int64)}, "wrong dtype"),
        ({"action": np.full((4, 3), np.inf, np.float32)}, "not finite"),
    ],
)
def test_check_names_what_is_wrong(changes, reason):
    episode().check(HOPPER)
    with pytest.raises(EpisodeError) as caught:
        episode(**changes).check(HOPPER)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "update this package"),
        (lambda m: m.update(schema_version=0), "rebuild the dataset"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("shards"), "shards"),
        (lambda m: m["vocabulary"].update(mu=99.0), "another vocabulary"),
        (lambda m: m.update(schema="other"), "not a Gato dataset"),
    ],
)
def test_a_wrong_manifest_is_refused(hopper, tmp_path, change, message):
    raw = json.loads((hopper / "dataset.json").read_text())
    change(raw)
    (tmp_path / "dataset.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_manifest(tmp_path)


def test_no_manifest_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match="etl.build"):
        load_manifest(tmp_path)
