"""What there is for each key under one policy: lanes, resources, places and flows; made when first asked for, and
forgotten when nothing of theirs waits or runs and there are many."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llmq.core.capacity import Depth, Gate, Places
from llmq.core.census import Census
from llmq.core.jobs import Job, LLMTaskMeta, Priority
from llmq.core.lanes import Claim, Flow, Lane, Line, Resource
from llmq.core.policy import Policy, identity
from llmq.core.rates import Bucket

_KEPT_IDLE = 1024

Buckets = dict[tuple[object, str | None], Bucket]


class Registry:
    """Finds and makes. `carried_over` are the buckets of the policy before, whose levels go on."""

    def __init__(self, policy: Policy, census: Census, carried_over: Buckets) -> None:
        self.policy = policy
        self.keys = policy.keys
        self.lanes: dict[tuple[int, tuple[str | None, ...]], Lane] = {}
        self.resources: dict[tuple[object, str | None], Resource] = {}
        self.gates: dict[str | None, Gate] = {}
        self.places: dict[tuple[int, str | None], Places] = {}
        self.flows: dict[tuple[int, str | None], Flow] = {}
        self._census = census
        self._depths = policy.depths
        self._carried_over = carried_over
        self._most_lanes = math.inf

    def settle_in(self) -> None:
        """From now on all that is in use can be told from what is not."""
        self._most_lanes = max(_KEPT_IDLE, 2 * len(self.lanes))

    def claim(self, meta: LLMTaskMeta, now: float) -> Claim:
        """What a call of this kind will take. Raises ValueError and TypeError for metadata that cannot be used."""
        if not isinstance(meta.rank, int) or not isinstance(meta.priority, int):
            raise TypeError(f"priority and rank are whole numbers, got {meta.priority!r} and {meta.rank!r}")
        if not Priority.URGENT <= meta.priority <= Priority.LOW:
            raise ValueError(f"priority is one of {', '.join(Priority.__members__)}; got {meta.priority!r}")
        if meta.tokens is not None and not (isinstance(meta.tokens, (int, float)) and 0 <= meta.tokens < math.inf):
            raise ValueError(f"tokens is an estimate, a number of at least 0, or None; got {meta.tokens!r}")
        return Claim(self.lane(meta, now), meta)

    def lane(self, meta: LLMTaskMeta, now: float) -> Lane:
        """Where a call of this kind waits."""
        values = tuple(meta.value_of(name) for name in self.keys)
        key = (int(meta.priority), values)
        lane = self.lanes.get(key)
        if lane is None:
            if len(self.lanes) >= self._most_lanes:
                self._forget_idle(now)
            by_name = dict(zip(self.keys, values, strict=True))
            resources, flow = tuple(self._resources_of(by_name, now)), self._flow(key[0], by_name)
            lane = self.lanes[key] = Lane(key[0], values, resources, flow)
        return lane

    def gate(self, model_name: str | None) -> Gate:
        """A model's gate."""
        gate = self.gates.get(model_name)
        if gate is None:
            gate = self.gates[model_name] = Gate(model_name, self.line())
        return gate

    def places_of(self, job: Job) -> list[Places]:
        """The bounds on waiting that count a job."""
        values = dict(zip(self.keys, job.claim.lane.values, strict=False))  # an ended job may be of an older policy
        found = []
        for number, depth in enumerate(self._depths):
            key = None if depth.by is None else values.get(depth.by)
            places = self.places.get((number, key))
            if places is None:
                places = self.places[number, key] = Places(key, depth.limit_of(key), depth.by)
            found.append(places)
        return found

    def line(self) -> Line:
        """A new line, in the order that the policy says."""
        return Line(self.policy.ageing_seconds, self.policy.strict)

    def every_resource(self) -> list[Resource]:
        """Gates, seats and buckets."""
        return [*self.gates.values(), *self.resources.values()]

    def buckets_to_carry_over(self, now: float) -> Buckets:
        """Those that are not full, and those of the policy before this one that nobody has asked for yet."""
        return {key: each for key, each in {**self._carried_over, **self.buckets()}.items() if not each.idle(now)}

    def buckets(self) -> Buckets:
        """Those of the rates."""
        return {key: found for key, found in self.resources.items() if isinstance(found, Bucket)}

    def _resources_of(self, by_name: dict[str, str | None], now: float) -> Iterator[Resource]:
        yield self.gate(by_name["model_name"])
        for limit in self.policy.limits:
            if not isinstance(limit, Depth):
                key = identity(limit), None if limit.by is None else by_name[limit.by]
                found = self.resources.get(key)
                if found is None:
                    found = self.resources[key] = limit.resource(key[1], self.line())
                    old = self._carried_over.pop(key, None)
                    if old is not None and isinstance(found, Bucket):
                        found.carry_over(old, now)
                yield found

    def _flow(self, priority: int, by_name: dict[str, str | None]) -> Flow | None:
        share = self.policy.fair_share
        if share is None:
            return None
        key = by_name[share.by]
        flow = self.flows.get((priority, key))
        if flow is None:
            flow = self.flows[priority, key] = Flow(share.weights.get(key, 1.0))
        return flow

    def _forget_idle(self, now: float) -> None:
        """Forget lanes, and what only they needed, of which nothing waits or runs. Amortised O(1)."""
        kept = {}
        for key, lane in self.lanes.items():
            if lane.waiting or lane.in_flight or lane.is_plain:
                kept[key] = lane
            else:
                self._census.remember(lane, self.keys)
        self.lanes = kept
        needed = {resource for lane in kept.values() for resource in lane.resources}
        flows = {lane.flow for lane in kept.values()}
        self.gates = {k: g for k, g in self.gates.items() if g in needed or not g.idle(now)}
        self.resources = {k: r for k, r in self.resources.items() if r in needed or not r.idle(now)}
        self.places = {k: p for k, p in self.places.items() if p.taken or p.door}
        self.flows = {k: f for k, f in self.flows.items() if f in flows}
        self._most_lanes = max(_KEPT_IDLE, 2 * len(kept), len(self.resources))
