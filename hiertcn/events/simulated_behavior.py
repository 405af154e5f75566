"""What simulated users do: when they come, what they are shown, and what they choose.

A block of users walks in lockstep over event positions, so the cost is numpy work per event
(about 60,000 events/s on one core) and the memory is that of one block. A user's long-term
interest drifts slowly from session to session; the session's intent starts near it and then moves
quickly, towards the topic that follows the item just chosen. Every choice is a softmax draw over
the true utility of the impressions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.events.simulated_world import World

SESSION_GAP_S = 1800.0

_DAY_S = 86_400.0
_MAX_STEP_S = 1200.0
_INTENT_WEIGHT = 6.0
_INTEREST_WEIGHT = 2.5
_POPULARITY_WEIGHT = 0.4
_DRIFT_PER_SQRT_DAY = 0.12
_SESSION_MEMORY_DAYS = 2.0
# Shares of the production policy: popular, coarse interest, related to the last item, random.
_POLICY = np.cumsum([0.3, 0.3, 0.2])


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of a count that is at least 1 (Table 1 of the HierTCN paper)."""

    mean: float
    std: float

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Draw int64 [size]: one plus a negative binomial with these moments."""
        excess = self.mean - 1.0
        variance = self.std**2
        if excess <= 0.0:
            return np.ones(size, dtype=np.int64)
        if variance <= excess:
            return 1 + rng.poisson(excess, size)
        shape = excess**2 / (variance - excess)
        return 1 + rng.poisson(rng.gamma(shape, excess / shape, size))


@dataclass(frozen=True)
class BlockOfEvents:
    """The events of one block of users, ordered by user and time.

    Attributes:
        user: int64 [events], numbered from 0 within the block.
        item: int64 [events], the chosen item.
        time_us: int64 [events], microseconds after the start of the simulated span; a multiple
            of 1000, strictly increasing within a user.
        impression_offsets: int64 [events + 1] into ``impressions``.
        impressions: int64 [impressions], the items shown, distinct within an event, in the order
            shown; the chosen one is among them.
        oracle_rank: int32 [events], rank of the chosen item by true utility, ties pessimistic.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time_us: NDArray[np.int64]
    impression_offsets: NDArray[np.int64]
    impressions: NDArray[np.int64]
    oracle_rank: NDArray[np.int32]


def simulate_users(
    rng: np.random.Generator,
    world: World,
    *,
    users: int,
    days: int,
    sessions: Moments,
    interactions: Moments,
    impressions: Moments,
) -> BlockOfEvents:
    """Simulate ``users`` users over ``days`` days.

    Sessions that would not fit into the span (only users with dozens of sessions in a few days)
    are dropped, so the mean of sessions per user is a little lower for very short spans.
    """
    plan = _plan_visits(rng, users=users, days=days, sessions=sessions, interactions=interactions)
    return _walk(rng, world, plan, impressions)


@dataclass(frozen=True)
class _Plan:
    event_offsets: NDArray[np.int64]
    user: NDArray[np.int64]
    starts_session: NDArray[np.bool_]
    time_s: NDArray[np.float64]


def _plan_visits(
    rng: np.random.Generator, *, users: int, days: int, sessions: Moments, interactions: Moments
) -> _Plan:
    span = days * _DAY_S
    session_user = np.repeat(np.arange(users), sessions.draw(rng, users))
    session_length = interactions.draw(rng, len(session_user))
    steps = np.minimum(rng.lognormal(3.6, 1.0, size=int(session_length.sum())) + 2.0, _MAX_STEP_S)
    first = np.cumsum(session_length) - session_length
    steps[first] = 0.0
    elapsed = _cumulative_within(steps, first, session_length)
    # A session blocks its own length and a pause long enough to be cut from the next.
    blocked = np.maximum.reduceat(elapsed, first) + 1.5 * SESSION_GAP_S

    first_session = np.searchsorted(session_user, np.arange(users))
    sessions_of = np.bincount(session_user, minlength=users)
    blocked_before = _cumulative_within(blocked, first_session, sessions_of) - blocked
    fits = blocked_before + blocked <= 0.9 * span
    fits[first_session] = True

    arrival = 0.5 * rng.random(users) ** 2
    point = np.where(fits, rng.random(len(session_user)), np.inf)
    point = point[np.lexsort((point, session_user))]
    free = np.maximum(span - np.bincount(session_user, blocked * fits, minlength=users), 0.0)
    with np.errstate(invalid="ignore"):
        share = arrival[session_user] + (1.0 - arrival[session_user]) * point
        # Visits crowd into the evening; the warp is monotone, so the order of visits stays.
        day = share * days
        share = (day + 0.1 * np.sin(2.0 * np.pi * day)) / days
        start = share * free[session_user] + blocked_before

    keep = np.repeat(fits, session_length)
    session_of_event = np.repeat(np.arange(len(session_user)), session_length)
    user = session_user[session_of_event][keep]
    starts_session = np.zeros(len(steps), dtype=np.bool_)
    starts_session[first] = True
    return _Plan(
        event_offsets=np.searchsorted(user, np.arange(users + 1)),
        user=user,
        starts_session=starts_session[keep],
        time_s=(start[session_of_event] + elapsed)[keep],
    )


def _walk(
    rng: np.random.Generator, world: World, plan: _Plan, impressions: Moments
) -> BlockOfEvents:
    events = len(plan.user)
    counts = np.minimum(impressions.draw(rng, events), world.items)
    lengths = np.diff(plan.event_offsets)
    # Longest first: the users still active at a position are then a prefix.
    order = np.argsort(-lengths, kind="stable")
    start = plan.event_offsets[:-1][order]
    lengths = lengths[order]

    interest = _draw_interest(rng, world, len(order))
    coarse_guess = _topic_cdf(interest[:, : world.topics])
    intent = interest.copy()
    last_item = np.full(len(order), -1, dtype=np.int64)
    last_time = plan.time_s[start].copy()

    item = np.empty(events, dtype=np.int64)
    rank = np.empty(events, dtype=np.int32)
    shown: list[NDArray[np.int64]] = []
    shown_event: list[NDArray[np.int64]] = []
    for position in range(int(lengths[0])):
        active = int(np.searchsorted(-lengths, -position, side="left"))
        event = start[:active] + position
        time = plan.time_s[event]
        opening = np.flatnonzero(plan.starts_session[event])
        if len(opening):
            days_away = (time[opening] - last_time[opening]) / _DAY_S
            interest[opening] = _drift(rng, interest[opening], days_away)
            intent[opening] = _opening_intent(
                rng, world, interest[opening], intent[opening], days_away, position
            )
            last_item[opening] = -1

        row, candidate = _show(rng, world, coarse_guess[:active], last_item[:active], counts[event])
        utility = _utility(world, candidate, intent[row], interest[row])
        first = np.searchsorted(row, np.arange(active))
        choice = _argmax_within(utility + rng.gumbel(size=len(utility)), first)
        item[event] = candidate[choice]
        at_least = utility >= utility[choice][row]
        rank[event] = np.add.reduceat(at_least.astype(np.int32), first)
        shown.append(candidate)
        shown_event.append(event[row])

        last_item[:active] = item[event]
        last_time[:active] = time
        intent[:active] = _move_on(rng, world, intent[:active], world.vectors[item[event]])

    flat_event = np.concatenate(shown_event)
    by_event = np.argsort(flat_event, kind="stable")
    offsets = np.searchsorted(flat_event[by_event], np.arange(events + 1))
    return BlockOfEvents(
        user=plan.user,
        item=item,
        time_us=_strictly_increasing_ms(plan) * 1000,
        impression_offsets=offsets,
        impressions=np.concatenate(shown)[by_event],
        oracle_rank=rank,
    )


def _draw_interest(rng: np.random.Generator, world: World, users: int) -> NDArray[np.float32]:
    interest = np.empty((users, world.vectors.shape[1]), dtype=np.float32)
    interest[:, : world.topics] = rng.dirichlet(np.full(world.topics, 0.12), size=users)
    interest[:, : world.topics] **= 0.5
    interest[:, world.topics :] = 0.25 * rng.standard_normal(
        (users, world.vectors.shape[1] - world.topics)
    )
    return _unit(interest)


def _drift(
    rng: np.random.Generator, interest: NDArray[np.float32], days: NDArray[np.float64]
) -> NDArray[np.float32]:
    step = _DRIFT_PER_SQRT_DAY * np.sqrt(days / interest.shape[1]).astype(np.float32)
    noise = rng.standard_normal(interest.shape, dtype=np.float32)
    return _unit(interest + step[:, None] * noise)


def _opening_intent(
    rng: np.random.Generator,
    world: World,
    interest: NDArray[np.float32],
    last_intent: NDArray[np.float32],
    days_away: NDArray[np.float64],
    position: int,
) -> NDArray[np.float32]:
    mood = _draw_from(rng, _topic_cdf(interest[:, : world.topics]))
    intent = interest.copy()
    intent[np.arange(len(mood)), mood] += 0.5
    if position > 0:
        memory = 0.6 * np.exp(-days_away / _SESSION_MEMORY_DAYS).astype(np.float32)
        intent += memory[:, None] * last_intent
    return _unit(intent)


def _move_on(
    rng: np.random.Generator,
    world: World,
    intent: NDArray[np.float32],
    chosen: NDArray[np.float32],
) -> NDArray[np.float32]:
    noise = rng.standard_normal(intent.shape, dtype=np.float32) / np.sqrt(intent.shape[1])
    moved = 0.3 * intent + 0.15 * chosen + 0.55 * (chosen @ world.transition) + 0.15 * noise
    return _unit(moved.astype(np.float32))


def _utility(
    world: World,
    candidate: NDArray[np.int64],
    intent: NDArray[np.float32],
    interest: NDArray[np.float32],
) -> NDArray[np.float32]:
    wish = np.float32(_INTENT_WEIGHT) * intent + np.float32(_INTEREST_WEIGHT) * interest
    match = np.einsum("nd,nd->n", world.vectors[candidate], wish)
    quality = np.float32(_POPULARITY_WEIGHT) * world.log_popularity[candidate]
    utility: NDArray[np.float32] = match + quality
    return utility


def _show(
    rng: np.random.Generator,
    world: World,
    coarse_guess: NDArray[np.float64],
    last_item: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (row, item) of all impressions, ordered by row; items are distinct within a row."""
    row = np.repeat(np.arange(len(counts)), counts)
    source = np.searchsorted(_POLICY, rng.random(len(row)), side="right")
    topic = _draw_from(rng, coarse_guess[row])
    last = last_item[row]
    followed = world.topic[last]
    followed = np.where(rng.random(len(row)) < 0.5, followed, world.successor[followed])
    topic = np.where((source == 2) & (last >= 0), followed, topic)
    item = np.where(
        source == 0,
        world.draw_popular(rng, None, len(row)),
        world.draw_popular(rng, topic, len(row)),
    )
    item = np.where(source == 3, rng.integers(0, world.items, size=len(row)), item)

    for _ in range(3):
        bad = _repeated(row, item, world.items) | (item == last)
        if not bad.any():
            break
        item[bad] = rng.integers(0, world.items, size=int(bad.sum()))
    keep = ~_repeated(row, item, world.items)
    return row[keep], item[keep]


def _repeated(row: NDArray[np.int64], item: NDArray[np.int64], items: int) -> NDArray[np.bool_]:
    key = row * items + item
    order = np.argsort(key, kind="stable")
    repeated = np.zeros(len(key), dtype=np.bool_)
    repeated[order[1:]] = key[order[1:]] == key[order[:-1]]
    return repeated


def _topic_cdf(topics: NDArray[np.float32]) -> NDArray[np.float64]:
    weight = np.exp(5.0 * topics.astype(np.float64))
    cdf = np.cumsum(weight, axis=1)
    result: NDArray[np.float64] = cdf / cdf[:, -1:]
    return result


def _draw_from(rng: np.random.Generator, cdf: NDArray[np.float64]) -> NDArray[np.int64]:
    # Rounding can leave the last value a little below 1, hence the minimum.
    drawn: NDArray[np.int64] = (cdf < rng.random(len(cdf))[:, None]).sum(axis=1)
    return np.minimum(drawn, np.int64(cdf.shape[1] - 1))


def _argmax_within(values: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    best = np.maximum.reduceat(values, first)
    sizes = np.diff(np.append(first, len(values)))
    hits = np.flatnonzero(values == np.repeat(best, sizes))
    chosen: NDArray[np.int64] = hits[np.searchsorted(hits, first)]
    return chosen


def _cumulative_within(
    values: NDArray[np.float64], first: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    total = np.cumsum(values)
    return total - np.repeat(total[first] - values[first], sizes)


def _strictly_increasing_ms(plan: _Plan) -> NDArray[np.int64]:
    # Steps within a session are at least 2 s and pauses 45 min, so rounding keeps the order.
    return np.floor(plan.time_s * 1000.0).astype(np.int64)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result
