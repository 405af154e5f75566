"""A release serves the same item vectors however its table is held."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.releases.serving_release import ServingRelease

NUMBER = 2026010101


@pytest.mark.parametrize("item_memory", ["mapped", "prefault", "huge-pages"])
def test_the_table_is_the_same_however_it_is_held(toy_repository, item_memory):
    toy_repository.publish(NUMBER)
    release = ServingRelease(toy_repository.repository, NUMBER, None, item_memory)
    plain = ServingRelease(toy_repository.repository, NUMBER)
    rows = np.arange(5)
    assert np.array_equal(release.table.gather(rows), plain.table.gather(rows))


def test_an_unknown_way_is_refused(tmp_path: Path):
    options = SidecarOptions(repository=tmp_path, triton_url="localhost:1", state_dir=tmp_path)
    with pytest.raises(InputError, match="item_memory is 'swap'; expected one of mapped"):
        replace(options, item_memory="swap")
