"""The paper's section 4.3.4: memory of one batch's input data, HierTCN beside TCN.

TCN keeps the whole history of each user of the batch, zero-padded to the longest one; HierTCN keeps
one session of each, padded to the longest session (the paper's layout), or packed without padding.
"""

from typing import Any, Final

import numpy as np

from benchmarks.paper_numbers import MEMORY_SAVED_AT_MOST
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.store import SessionStore

_BATCH: Final = 32
"""The paper's batch size."""


def memory_table(training: SessionStore, dim: int, seed: int = 0) -> dict[str, Any]:
    """Print and return the mean bytes of a batch's float32 item vectors over one epoch.

    Args:
        training: the sessions to learn from.
        dim: width of an item vector.
        seed: order of the users.
    """
    longest = int(np.diff(training.session_offsets).max())
    batches = SessionBatches(
        training, lanes=_BATCH, sessions_per_step=1, max_length=longest, seed=seed
    )
    packed, padded = [], []
    for batch in batches.epoch(0):
        packed.append(int(batch.lengths.sum()))
        padded.append(len(batch.lengths) * int(batch.lengths.max()))
    histories = np.diff(training.session_offsets[training.user_offsets])
    shuffled = np.random.default_rng(seed).permutation(histories)
    whole = [
        len(part) * int(part.max())
        for part in np.split(shuffled, range(_BATCH, len(shuffled), _BATCH))
    ]
    width = 4 * dim
    sizes = {
        "TCN, whole histories padded": float(np.mean(whole)) * width,
        "HierTCN, sessions padded": float(np.mean(padded)) * width,
        "HierTCN, sessions packed": float(np.mean(packed)) * width,
    }
    base = sizes["TCN, whole histories padded"]
    print(
        f"\n## Data memory of a batch of {_BATCH} users (section 4.3.4)\n"
        f"float32 vectors of width {dim}; padding of the padded sessions "
        f"{1 - sum(packed) / sum(padded):.0%}, of the packed ones none. The paper saves up to "
        f"{MEMORY_SAVED_AT_MOST:.0%}; it depends on the sessions a user has, so it can be compared "
        f"where those are alike (here {training.meta.sessions / training.meta.users:.1f} sessions "
        f"a user, Pinterest 3.9, XING 8.2).\n"
    )
    print("| layout | bytes a batch | saved |\n|---|---|---|")
    for layout, size in sizes.items():
        print(f"| {layout} | {size:,.0f} | {1 - size / base:.1%} |")
    return {"bytes": sizes, "saved": {name: 1 - size / base for name, size in sizes.items()}}
