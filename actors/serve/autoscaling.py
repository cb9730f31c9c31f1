"""Autoscaling of the model roles, by used cache and queued extends.

Sessions reach the models over sockets and not through Serve, so to Serve's own policy every model deployment is idle.
Serve applies its delays and bounds to the result of this policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

CACHE_USED = "cache_used"  # share of a replica's cache, 0 to 1
WAITING = "waiting"  # extends that are queued or running on a replica
FEWER_AT = 0.8  # scale down only if fewer replicas would be loaded to at most this share of the targets


class ScalingContext(Protocol):
    """The part of Serve's AutoscalingContext that this policy reads."""

    target_num_replicas: int  # including replicas that are starting or wait for a node

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """Means over Serve's look-back period: metric -> replica -> value."""
        ...


class LoadPolicy:
    """Serve's autoscaling policy of a model role: as many replicas as both loads need to stay at their targets.

    The sessions of a replica that stops move to the others. So the number is lowered only if the others can take the
    whole load with some room: otherwise the next session would start a replica again.

    Example, target_cache 0.7 and two replicas. With 0.4 and 0.2 of their caches in use, 0.6 / 0.7 = 0.86 replicas are
    needed, but 0.86 / 0.8 = 1.07 with room: two stay. With 0.3 and 0.2, 0.71 and with room 0.89: one is enough.

    Serve's controller runs a pickle of this class without the project's code, so this module imports none of it.
    """

    def __init__(self, target_cache: float, target_waiting: float) -> None:
        """target_cache: used share of one replica's cache. target_waiting: queued or running extends of one replica."""
        self._targets = {CACHE_USED: target_cache, WAITING: target_waiting}

    def __call__(self, context: ScalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas to run, and an empty state."""
        now, metrics = context.target_num_replicas, context.aggregated_metrics or {}
        observed = {name: metrics[name].values() for name in self._targets if metrics.get(name)}
        if not observed:
            return now, {}
        needed = max(sum(values) / self._targets[name] for name, values in observed.items())
        return max(_rounded_up(needed), min(now, _rounded_up(needed / FEWER_AT))), {}


def _rounded_up(replicas: float) -> int:
    return math.ceil(replicas - 1e-6)  # rounding errors of a sum must not add a replica
