"""Count the calls that are left, with their tokens and price, from the state of a ledger."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

from ReasonAug.synthesis.calls import Call, NotAskedError
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import Ledger, Record, Usage
from ReasonAug.synthesis.limits import prices_of
from ReasonAug.synthesis.prompts import Prompts

# Tokens of (values filled into a prompt, answer), where the ledger has no answer to tell.
_TYPICAL = {
    "propose": (300, 300),
    "definition": (20, 300),
    "problem": (350, 700),
    "check": (600, 60),
    "rewrite": (700, 700),
    "tests": (350, 300),
    "solve-coding": (350, 400),
    "solve-numeric": (300, 500),
    "judge": (800, 80),
    "negative": (600, 700),
    "forum": (300, 350),
    "exam": (300, 250),
}
_JUDGED = ("check", "tests", "solve-coding", "solve-numeric", "judge")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """The work that is left of one stage."""

    stage: str
    recorded: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class Plan:
    """The transport of a dry run: counts calls instead of sending them."""

    def __init__(self, config: SynthesisConfig, prompts: Prompts, ledger: Ledger) -> None:
        self._config, self._prompts, self._ledger = config, prompts, ledger
        self.stage = ""
        self._calls: dict[str, Counter[str]] = defaultdict(Counter)
        self.recorded: Counter[str] = Counter()

    async def send(self, call: Call[Any]) -> Record:
        """Count a call.

        Raises:
            NotAskedError: always; what follows from its answer cannot be known.
        """
        self._calls[self.stage][call.prompt.name] += 1
        raise NotAskedError

    def add(self, prompts: list[str]) -> None:
        """Count calls of the current stage whose texts are not known yet."""
        self._calls[self.stage].update(prompts)

    def stages(self) -> list[StagePlan]:
        """Return what is left, stage by stage."""
        used: dict[str, Usage] = defaultdict(Usage)
        for stage in self._ledger.usage().values():
            for (_, origin, name), usage in stage.items():
                if origin != "import":
                    used[name].calls += usage.calls - usage.failed
                    used[name].prompt_tokens += usage.prompt_tokens
                    used[name].completion_tokens += usage.completion_tokens
        return [self._stage(name, used) for name in self._calls.keys() | self.recorded.keys()]

    def _stage(self, stage: str, used: dict[str, Usage]) -> StagePlan:
        calls, prompt, completion, cost = 0, 0.0, 0.0, 0.0
        for name, count in self._calls[stage].items():
            asked, answered = self._tokens(name, used[name])
            model = self._config.model
            asks = (model.judge or model.name) if name in _JUDGED else model.name
            calls += count
            prompt += count * asked
            completion += count * answered
            prices = prices_of(self._config, asks, self._config.api)
            cost += count * prices.cost(asked, answered)
        return StagePlan(
            stage=stage,
            recorded=self.recorded[stage],
            calls=calls,
            prompt_tokens=round(prompt),
            completion_tokens=round(completion),
            cost=cost,
        )

    def _tokens(self, name: str, used: Usage) -> tuple[float, float]:
        if used.calls and used.completion_tokens:
            return used.prompt_tokens / used.calls, used.completion_tokens / used.calls
        values, answer = _TYPICAL.get(name, (300, 300))
        kind = "numeric" if name in ("definition", "problem", "rewrite") else ""
        prompt = self._prompts.get(name, kind)
        return (len(prompt.system) + len(prompt.user)) / 4 + values, answer
