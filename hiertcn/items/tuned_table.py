"""Carries what training changed in some item vectors over to a table of newer ones.

HierTCN may train the vectors of a table as of some day; what serves is a table of the same encoder
as of now, in which the graph has moved on. What a row learnt is its difference from where it
started, so that is what is added to the newer row. A row that did not change stays as it is.
"""

import os
import shutil
from pathlib import Path
from typing import cast

import numpy as np

from hiertcn.errors import InputError
from hiertcn.files import whole_directory
from hiertcn.items.table import ItemTable, TableDtype


def write_tuned_table(
    newer: ItemTable, start: ItemTable, trained: ItemTable, output: Path
) -> ItemTable:
    """Write ``newer + (trained - start)``, in the dtype of ``newer``.

    Takes the memory of three tables in float32.

    Args:
        newer: ``[items, dim]``, what serving would use without the training.
        start: ``[items, dim]``, where the training started.
        trained: ``[items, dim]``, where it ended.
        output: folder to write, whole or not at all.

    Raises:
        InputError: the tables differ in shape, or a sum is not finite in the dtype.
    """
    for table in (start, trained):
        if table.vectors.shape != newer.vectors.shape:
            raise InputError(
                f"the item table {table.directory} has the shape {list(table.vectors.shape)} but "
                f"{newer.directory} {list(newer.vectors.shape)}; use the tables of one run"
            )
    learnt = np.asarray(trained.vectors, np.float32) - np.asarray(start.vectors, np.float32)
    vectors = np.asarray(newer.vectors, np.float32) + learnt
    return ItemTable.write(output, vectors, cast(TableDtype, newer.vectors.dtype.name))


def pass_table_on(table: ItemTable, output: Path) -> ItemTable:
    """Put a table's files under another folder, as hard links where the file system has them.

    Safe because a table's files are never changed, only replaced.
    """
    with whole_directory(output) as folder:
        shutil.copytree(table.directory, folder, copy_function=_link, dirs_exist_ok=True)
    return ItemTable.open(output)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
