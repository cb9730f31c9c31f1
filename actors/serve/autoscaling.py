"""How many replicas a model role wants: by used cache and waiting extends, which Serve's count of requests cannot see.

Sessions reach the models over sockets, not through Serve, so every model deployment looks idle to Serve's own policy.
Its delays and bounds are applied to what this one wants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

CACHE_USED = "cache_used"  # share of a replica's cache, 0 to 1
WAITING = "waiting"  # extends that wait or run on a replica
FEWER_AT = 0.8  # of the targets: fewer replicas must be able to take the load with so much to spare


class ScalingContext(Protocol):
    """The part of Serve's AutoscalingContext that is read here. aggregated_metrics: name -> replica -> mean value."""

    target_num_replicas: int  # that Serve keeps now, those that are starting or awaiting a node included

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What the replicas recorded, averaged over Serve's look-back period."""
        ...


class LoadPolicy:
    """Serve's autoscaling policy of a model role: enough replicas that none has more than its target of either load.

    Sessions of a replica that goes move to the others, so fewer are wanted only where all load fits these, with room
    to spare: else the next session would start one again.

    The controller runs it from a pickle of this class, without the project's code: it needs nothing but this module.
    """

    def __init__(self, target_cache: float, target_waiting: float) -> None:
        """target_cache: share of one replica's cache. target_waiting: extends that wait or run on one replica."""
        self._targets = {CACHE_USED: target_cache, WAITING: target_waiting}

    def __call__(self, context: ScalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state."""
        now, metrics = context.target_num_replicas, context.aggregated_metrics or {}
        observed = {name: metrics[name].values() for name in self._targets if metrics.get(name)}
        if not observed:
            return now, {}
        needed = max(sum(values) / self._targets[name] for name, values in observed.items())
        return max(_rounded_up(needed), min(now, _rounded_up(needed / FEWER_AT))), {}


def _rounded_up(replicas: float) -> int:
    return math.ceil(replicas - 1e-6)  # a sum of shares may be a little above the whole number that it means
