"""The examples of docs/api.md: each JSON is its message, and the Python runs as written."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf import json_format

from hiertcn import errors
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.rpc import validation
from hiertcn.serving.rpc.status import status_of

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_json_examples_are_messages_of_the_proto():
    found = re.findall(r"```json (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) >= 9
    for name, text in found:
        json_format.Parse(text, getattr(pb, name)())


def test_the_python_examples_run(new_toys, shared_triton, start_sidecar, tmp_path, shared_toy):
    items = pa.table(
        {
            "item_id": [f"item-{row}" for row in range(50)],
            "category": [("lamps", "chairs", "tables")[row % 3] for row in range(50)],
            "price": [row * 4.0 for row in range(50)],
        }
    )
    pq.write_table(items, tmp_path / "items.parquet")
    shared_toy.publish(2026010102, seed=5, items_file=tmp_path / "items.parquet")
    running = start_sidecar(shared_toy, shared_triton.grpc_url)
    code = "\n".join(blocks("python"))
    assert code.count('"127.0.0.1:50051"') == 1
    names = {}
    code = code.replace('"127.0.0.1:50051"', repr(running.sidecar.address))
    exec(compile(code, str(PAGE), "exec"), names)
    names["client"].close()
    assert names["found"].items and not names["found"].fallback
    for item in names["found"].items:
        row = int(item.item_id.removeprefix("item-"))
        assert row % 3 < 2 and row * 4.0 <= 99.5
    assert len(names["user"].journal) == 101
    assert running.client.get_user("ada") is None


def test_the_page_states_the_limits_that_the_code_has(tmp_path):
    text = " ".join(PAGE.read_text().split())
    options = SidecarOptions(repository=tmp_path, triton_url="", state_dir=tmp_path)
    assert f"at most {validation.MAX_ID_BYTES} bytes" in text
    assert f"`--max-in-flight` requests ({options.max_in_flight})" in text
    assert f"above {options.target_latency_s} s on average" in text


def test_the_page_names_every_status():
    for kind in vars(errors).values():
        if isinstance(kind, type) and kind is not errors.HiertcnError:
            assert status_of(kind("")).name in PAGE.read_text()
