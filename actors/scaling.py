"""How many replicas a model role wants: by used cache and waiting extends, which Serve's count of requests cannot see.

Sessions reach the models over sockets, not through Serve, so every model deployment looks idle to Serve's own policy.
Its delays and bounds are applied to what this one wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

CACHE_USED = "cache_used"  # share of a replica's cache, 0 to 1
WAITING = "waiting"  # extends that wait or run on a replica
CACHE_TARGET = 0.7  # above it sessions soon evict one another
WAITING_TARGET = 32.0  # above it a forward is as wide as it usefully gets


class ScalingContext(Protocol):
    """The part of Serve's AutoscalingContext that is read here. aggregated_metrics: name -> replica -> mean value."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What the replicas recorded, averaged over Serve's look-back period."""
        ...


def replicas_wanted(context: ScalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: replicas (fractions are rounded up by Serve) at which both targets would be met."""
    metrics = context.aggregated_metrics or {}
    cache = sum(metrics.get(CACHE_USED, {}).values()) / CACHE_TARGET
    waiting = sum(metrics.get(WAITING, {}).values()) / WAITING_TARGET
    if not any(metrics.get(name) for name in (CACHE_USED, WAITING)):
        return context.current_num_replicas, {}  # nothing was heard yet
    return max(cache, waiting), {}
