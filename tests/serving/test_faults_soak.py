"""The soak's own functions at a size for every day; ``make soak`` runs them for hours."""

import json
from concurrent.futures import ThreadPoolExecutor

from benchmarks.soak import is_sound, killed, steady
from hiertcn.serving.client import Interaction
from pipelines.serving_process import ServingProcess
from tests.waiting import WAIT_S, patient_client

NUMBER = 2026010101
KILLS = 5
TURNS, REQUESTS, THREADS = 8, 500, 8


def test_nothing_acknowledged_is_lost_or_repeated_over_five_kills(
    shared_toy, shared_triton, tmp_path
):
    toy = shared_toy.toys[NUMBER]
    found = killed(
        shared_toy.root,
        tmp_path / "killed",
        toy.item_ids,
        kills=KILLS,
        options=[f"--triton-url={shared_triton.grpc_url}"],
    )
    assert is_sound(found), json.dumps(found)
    assert found["acknowledged"] == found["found"] >= KILLS * 50


def test_memory_is_flat_under_load(shared_toy, tmp_path):
    toy = shared_toy.toys[NUMBER]
    serving = ServingProcess(
        shared_toy.root,
        tmp_path / "state",
        tmp_path / "log",
        model_deadline_ms=int(WAIT_S * 1000),
        options=["--models=in-process", "--journal-entries=50"],
    )
    done = 0

    def ask(client, n):
        user, at_us = f"u{n % 40}", toy.watermark_us + n * 1_000_000
        if n % 4 == 0:
            return client.record([Interaction(user, f"item-{n % 50}", at_us)]).accepted
        found = client.recommend(user, k=20, candidates=toy.item_ids, timestamp_us=at_us)
        return not found.fallback

    def turn():
        nonlocal done
        numbers = range(done, done + REQUESTS)
        answered = sum(threads.map(lambda n: ask(clients[n % THREADS], n), numbers))
        done += REQUESTS
        return {"answered": answered, "errors": REQUESTS - answered}

    clients = [patient_client(serving.address) for _ in range(THREADS)]
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            found = steady(turn, serving.pid, turns=TURNS)
    finally:
        for client in clients:
            client.close()
        serving.stop()
    assert found["errors"] == 0
    assert found["anonymous_mib"]["growth_per_request_bytes"] < 2048, found
