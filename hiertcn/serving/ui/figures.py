"""The live figures of the page: counters of all processes of a sidecar, summed.

A further process is asked on its metrics port, as Prometheus would; one that does not answer within
a second is left out.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import aiohttp
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hiertcn.serving.observability.metrics import Metrics

_TIMEOUT: Final = aiohttp.ClientTimeout(total=1.0)
_SUMMED: Final = {
    "hiertcn_fallbacks_total": "fallbacks",
    "hiertcn_sessions_folded_total": "folded",
    "hiertcn_requests_in_flight": "in_flight",
}


async def live_figures(own: Metrics, host: str, ports: Sequence[int]) -> dict[str, Any]:
    """What the page shows, as JSON values; all of it since the start.

    ``latency`` holds for each method the requests answered within each of ``bounds_s`` seconds, and
    at its end those answered at all.

    Args:
        own: this process's counters.
        host: address of the other processes.
        ports: their metrics ports.
    """
    asked = [_families_at(f"http://{host}:{port}/metrics") for port in ports]
    others = await asyncio.gather(*asked)
    found = [list(own.registry.collect()), *(families for families in others if families)]
    return {"processes": len(found), **summed(found)}


def summed(processes: Iterable[Iterable[Metric]]) -> dict[str, Any]:
    """The figures of the metric families of each process."""
    requests: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    latency: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    totals = dict.fromkeys(_SUMMED.values(), 0.0)
    for families in processes:
        for family in families:
            for sample in family.samples:
                labels = sample.labels
                if sample.name == "hiertcn_requests_total":
                    requests[labels["method"]][labels["code"]] += sample.value
                elif sample.name == "hiertcn_request_seconds_bucket":
                    latency[labels["method"]][float(labels["le"])] += sample.value
                elif sample.name in _SUMMED:
                    totals[_SUMMED[sample.name]] += sample.value
    bounds = next((sorted(counts) for counts in latency.values()), [])
    return {
        "requests": requests,
        # JSON has no infinity, the last of them.
        "bounds_s": bounds[:-1],
        "latency": {
            method: [counts[bound] for bound in bounds] for method, counts in latency.items()
        },
        **totals,
    }


async def _families_at(url: str) -> list[Metric]:
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            session.get(url) as reply,
        ):
            text = await reply.text()
    except (aiohttp.ClientError, TimeoutError):
        return []
    return list(text_string_to_metric_families(text))
