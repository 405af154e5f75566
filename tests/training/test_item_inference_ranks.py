"""Two processes embed the items that one process embeds, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.graph.walks import Neighborhoods, WalkOptions
from hiertcn.training.distributed import Ranks
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig

EMBED = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from hiertcn.graph.walks import Neighborhoods, WalkOptions
from hiertcn.training.distributed import Ranks
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig

torch.set_num_threads(1)
items, top = 203, 4
rng = np.random.default_rng(0)
rows = rng.integers(0, items, (items, top)).astype(np.int32)
rows[::7, 2:] = rows[::11] = -1
weights = np.where(rows < 0, 0, 1 / np.maximum((rows >= 0).sum(1, keepdims=True), 1))
features = SimpleNamespace(
    values=rng.normal(size=(items, 3)).astype(np.float32), present=rng.random(items) < 0.9
)
torch.manual_seed(0)
encoder = GraphSAGE(GraphSAGEConfig(items=items, feature_dim=3, dim=5, hidden=6, layers=3))

def embed(output):
    ranks = Ranks.join(torch.device("cpu"))
    inputs = np.zeros((items, 18), np.float32)
    vectors = embed_items(
        encoder, features, Neighborhoods(rows, weights.astype(np.float32), WalkOptions(top=top)),
        16, output=output, layer_inputs=inputs, ranks=ranks, progress=False,
    )
    np.save(f"{output}.inputs-{ranks.rank}.npy", inputs)
    assert vectors.shape == (items, 5)


folder = Path(sys.argv[1])
embed(folder / "alone.npy")
store = torch.distributed.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
os.environ |= {
    "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
children = []
for rank in range(2):
    children.append(os.fork())
    if not children[-1]:
        os.environ["RANK"] = str(rank)
        embed(folder / "shared.npy")
        torch.distributed.destroy_process_group()
        os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_two_processes_write_one_processs_vectors(tmp_path):
    script = tmp_path / "embed.py"
    script.write_text(EMBED)
    # What a killed run left is not taken for this one's.
    stale = tmp_path / ".layers-shared.npy"
    stale.mkdir()
    (stale / "messages.npy").write_bytes(b"left over")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    alone, shared = np.load(tmp_path / "alone.npy"), np.load(tmp_path / "shared.npy")
    inputs = np.load(tmp_path / "alone.npy.inputs-0.npy")
    parts = [np.load(tmp_path / f"shared.npy.inputs-{rank}.npy") for rank in range(2)]
    np.testing.assert_array_equal(shared, alone)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    # Each filled the rows it computed, and nobody else's.
    filled = [part.any(axis=1) for part in parts]
    assert filled[0].sum() == 6 * 16 and not (filled[0] & filled[1]).any()
    np.testing.assert_array_equal(parts[0] + parts[1], inputs)
    assert not list(tmp_path.glob(".layers-*"))


def test_several_processes_need_one_file():
    encoder = GraphSAGE(GraphSAGEConfig(items=3, feature_dim=0))
    alone = np.full((3, 1), -1, np.int32), np.zeros((3, 1), np.float32)
    with pytest.raises(InputError, match="2 processes are to embed the items"):
        embed_items(encoder, None, Neighborhoods(*alone, WalkOptions(top=1)), ranks=Ranks(1, 2))
