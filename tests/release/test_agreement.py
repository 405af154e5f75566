"""Live counts and scoring terms of a release belong to its catalogue and its watermark."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hiertcn.errors import ReleaseError
from hiertcn.export.scoring_terms import export_terms
from hiertcn.files import read_json, write_json
from hiertcn.release.agreement import read_settings
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.transitions import TransitionOptions, TransitionTable
from models.scoring_terms import ScoringTerms

ITEMS = 30


def _table(items: int, follower: int) -> TransitionTable:
    return TransitionTable(
        options=TransitionOptions(),
        offsets=np.array([0] + [1] * items, np.int64),
        followers=np.array([follower], np.int32),
        weights=np.ones(1, np.float32),
        totals=np.ones(items, np.float32),
    )


@pytest.fixture
def parts(release_parts, tmp_path: Path) -> dict[str, Path]:
    states = tmp_path / "user_states"
    shutil.copytree(release_parts(0)["user_states"], states)
    _table(ITEMS, ITEMS - 1).save(states / "transitions")
    live = states / "live_counts"
    live.mkdir()
    np.save(live / "item_rows.npy", np.array([0, ITEMS - 1], np.int32))
    watermark_us = read_json(states / "snapshot.json")["watermark_us"]
    write_json(live / "header.json", {"format": 1, "watermark_us": watermark_us})
    torch.manual_seed(0)
    export_terms(ScoringTerms(FEATURES), tmp_path / "scoring_terms.safetensors")
    return {
        **release_parts(0),
        "user_states": states,
        "scoring_terms.safetensors": tmp_path / "scoring_terms.safetensors",
    }


def test_parts_of_one_run_agree(parts, exported_model) -> None:
    assert read_settings(parts, exported_model(0).files)["items"] == ITEMS


def _replace_transitions(parts: dict[str, Path], table: TransitionTable | None) -> None:
    shutil.rmtree(parts["user_states"] / "transitions")
    if table is not None:
        table.save(parts["user_states"] / "transitions")


def _other_watermark(parts: dict[str, Path]) -> None:
    write_json(parts["user_states"] / "live_counts" / "header.json", {"watermark_us": 1})


def _unknown_live_row(parts: dict[str, Path]) -> None:
    path = parts["user_states"] / "live_counts" / "item_rows.npy"
    np.save(path, np.array([ITEMS], np.int32))


def _other_terms(parts: dict[str, Path]) -> None:
    path = parts["scoring_terms.safetensors"]
    tensors = {**load_file(path), "weight": np.zeros((2, 2), np.float32)}
    save_file(tensors, path, {"terms": json.dumps(FEATURES)})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda parts: _replace_transitions(parts, None), "transitions"),
        (lambda parts: _replace_transitions(parts, _table(ITEMS - 1, 0)), "items of transitions"),
        (lambda parts: _replace_transitions(parts, _table(ITEMS, ITEMS)), "item row 30"),
        (_other_watermark, "watermark of live_counts"),
        (_unknown_live_row, "item row 30"),
        (_other_terms, "weight is"),
    ],
)
def test_parts_of_two_runs_are_refused(parts, exported_model, damage, reason: str) -> None:
    damage(parts)
    with pytest.raises(ReleaseError, match=reason):
        read_settings(parts, exported_model(0).files)
