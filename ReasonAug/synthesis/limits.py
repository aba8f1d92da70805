"""Limit calls: a rate of requests and tokens, and a budget of tokens and money."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping

from pipeline.errors import Stopped
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import Usage


class BudgetReachedError(Stopped):
    """The next call would pass the budget."""


class Rate:
    """Let at most so much through a minute, evenly, after a burst of one second's worth."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_second = None if per_minute is None else per_minute / 60
        self._free_at = 0.0

    async def take(self, amount: float) -> None:
        """Wait until `amount` more is allowed."""
        if self._per_second is None:
            return
        now = time.monotonic()
        start = max(self._free_at, now - 1.0)
        self._free_at = start + amount / self._per_second
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Take more, or give back, after an amount that was estimated is known."""
        if self._per_second is not None:
            self._free_at += amount / self._per_second


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """Prices of one token of a prompt and of a completion."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the price of a call."""
        return self.prompt * prompt_tokens + self.completion * completion_tokens


def prices_of(config: SynthesisConfig, model: str, origin: str) -> Prices:
    """Return the prices of a model by the way in which it is asked; imported answers are free."""
    given = config.prices
    prompt, completion = given.prompt, given.completion
    if model == config.model.judge:
        prompt = prompt if given.judge_prompt is None else given.judge_prompt
        completion = completion if given.judge_completion is None else given.judge_completion
    factor = {"live": 1.0, "batch": given.batch_factor}.get(origin, 0.0) / 1e6
    return Prices(prompt * factor, completion * factor)


def total(
    config: SynthesisConfig, usage: Mapping[str, Mapping[tuple[str, str, str], Usage]]
) -> tuple[int, float]:
    """Return the tokens and the money that the calls of a ledger have used."""
    tokens, cost = 0, 0.0
    for stage in usage.values():
        for (model, origin, _), used in stage.items():
            if origin == "import":
                continue
            tokens += used.prompt_tokens + used.completion_tokens
            cost += prices_of(config, model, origin).cost(
                used.prompt_tokens, used.completion_tokens
            )
    return tokens, cost


class Budget:
    """Tokens and money used so far, and reserved for requests in flight.

    A call reserves its longest possible answer, so the budget is never passed. One that does not
    fit waits for requests in flight, which mostly use less than they reserved.
    """

    def __init__(self, config: SynthesisConfig, tokens: int, cost: float) -> None:
        self._max_tokens, self._max_cost = config.limits.max_tokens, config.limits.max_cost
        self._currency = config.prices.currency
        self.tokens, self.cost = tokens, cost
        self._reserved_tokens, self._reserved_cost, self._in_flight = 0.0, 0.0, 0
        self._changed = asyncio.Condition()

    async def reserve(self, tokens: float, cost: float) -> None:
        """Wait until a call of at most this size fits.

        Raises:
            BudgetReachedError: it does not fit, although no request is in flight.
        """
        if self._max_tokens is None and self._max_cost is None:
            return
        async with self._changed:
            while fault := self._fault(tokens, cost):
                if not self._in_flight:
                    raise BudgetReachedError(fault)
                await self._changed.wait()
            self._reserved_tokens += tokens
            self._reserved_cost += cost
            self._in_flight += 1

    async def settle(self, tokens: float, cost: float, *, used: float, paid: float) -> None:
        """Replace a reservation by what the call used."""
        self.tokens += int(used)
        self.cost += paid
        if self._max_tokens is None and self._max_cost is None:
            return
        async with self._changed:
            self._reserved_tokens -= tokens
            self._reserved_cost -= cost
            self._in_flight -= 1
            self._changed.notify_all()

    def _fault(self, tokens: float, cost: float) -> str:
        limit = self._max_tokens
        if limit is not None and self.tokens + self._reserved_tokens + tokens > limit:
            return f"budget of {limit:,} tokens reached ({self.tokens:,} used; limits.max_tokens)"
        money = self._max_cost
        if money is not None and self.cost + self._reserved_cost + cost > money:
            unit = self._currency
            return (
                f"budget of {money:g} {unit} reached ({self.cost:.4f} {unit} used; limits.max_cost)"
            )
        return ""
