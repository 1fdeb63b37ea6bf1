"""The server's figures in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping

from elm_mlx.inference.requests import EngineStatistics

_GAUGES = {
    "rows": "Answers that are being decoded.",
    "reading": "Prompts that are being read.",
    "queued": "Requests that wait.",
    "weight_bytes": "Bytes of the models' weights.",
    "reserved_bytes": "Bytes of the KV caches of running requests at their longest.",
    "prefix_bytes": "Bytes of the prefix cache.",
    "max_memory": "Bytes that weights and caches may take together.",
}
_COUNTERS = {
    "read_tokens": "Tokens of prompts that were computed.",
    "cached_tokens": "Tokens of prompts that were found in the prefix cache.",
    "generated_tokens": "Tokens of answers.",
    "drafted_tokens": "Tokens that were guessed and verified.",
    "accepted_tokens": "Guessed tokens that were right.",
    "finished": "Requests that were answered.",
    "cancelled": "Requests whose client left.",
    "failed": "Requests that failed.",
    "refused": "Requests that had no place in the queue.",
}


def metrics_text(statistics: EngineStatistics, outcomes: Mapping[int, int]) -> str:
    """Returns the engine's figures, each with its help and type, and the number of HTTP requests by their status."""
    lines = []
    for kind, figures in (("gauge", _GAUGES), ("counter", _COUNTERS)):
        for name, text in figures.items():
            full = f"elm_mlx_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {getattr(statistics, name)}"]
    name = "elm_mlx_http_requests_total"
    lines += [f"# HELP {name} HTTP requests by status: 499 where the client left.", f"# TYPE {name} counter"]
    lines += [f'{name}{{status="{status}"}} {count}' for status, count in sorted(outcomes.items())]
    return "\n".join(lines) + "\n"
