"""Configure a synthesis: model, concepts, stages, limits and prices.

Keys of servers never stand here: `api_key_env` names the environment variable that holds one.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config import DecontaminateConfig
from pipeline.config.rules import UserPath, require, strict
from ReasonAug.problem import ALGORITHM, DATA_STRUCTURE, FINANCE, MATH, PHYSICS
from ReasonAug.sandbox import Limits

Kind = Literal["coding", "numeric", "text"]
Share = Annotated[float, Field(ge=0, le=1)]
Words = Annotated[tuple[str, ...], Field(min_length=1, description="choice")]

KINDS: dict[str, Kind] = {
    ALGORITHM: "coding",
    DATA_STRUCTURE: "coding",
    MATH: "numeric",
    PHYSICS: "numeric",
    FINANCE: "numeric",
}


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """One OpenAI-compatible server.

    Args:
        url: its base URL, usually ending in /v1.
        api_key_env: the environment variable with its key; null if it needs none.
    """

    url: str
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        # A key in a URL would end in logs and in the ledger; the message must not show it either.
        shown = f"{parts.scheme}://{parts.hostname or ''}"
        require(parts.scheme in ("http", "https"), "url", shown, "http://… or https://…")
        require(
            not (parts.username or parts.password or parts.query or parts.fragment),
            "url",
            f"{shown} with a user, query or fragment",
            "a URL without secrets",
            "put the key into the environment and name its variable in api_key_env",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model that writes, and its servers.

    Args:
        name: as the servers know it.
        judge: another model of the same servers, for the checks; by default the same one.
        servers: tried in turn; one that does not answer is left out for a while.
        structured: ask for answers by JSON schema, as a JSON object, or in words only; `auto`
            starts with the schema and falls back if a server refuses it.
        licence: licence of the model's outputs, for the card.
    """

    name: Annotated[str, Field(min_length=1)]
    judge: str | None = None
    servers: Annotated[tuple[ServerConfig, ...], Field(min_length=1, description="server")]
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    judge_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: PositiveInt = 2048
    structured: Literal["auto", "schema", "object", "none"] = "auto"
    licence: str = ""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProposeConfig:
    """Concepts of a domain that the model proposes until there are `count`."""

    domain: Annotated[str, Field(min_length=1)]
    count: PositiveInt
    per_call: PositiveInt = 25


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConceptsConfig:
    """The concepts to write problems about; lists of all origins are joined.

    Args:
        files: .txt (a name per line, or DOMAIN tab NAME), .jsonl (domain, concept and, if there
            is one, definition), .yaml (domain: list of names).
        domain: domain of names in .txt files.
        builtin: add the concepts of `python -m ReasonAug templates`, with their definitions.
        propose: domains for which the model proposes concepts.
        max_similarity: two definitions of at least this Jaccard similarity are one concept.
        max_count: use only this many, from the start.
    """

    files: tuple[UserPath, ...] = ()
    domain: str = ""
    builtin: bool = False
    propose: tuple[ProposeConfig, ...] = ()
    max_similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    max_count: PositiveInt | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.files or self.builtin or self.propose),
            "concepts",
            "nothing",
            "at least one of files, builtin and propose",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProblemsConfig:
    """Problems per concept, and the options that are drawn for each by the seed."""

    per_concept: PositiveInt = 8
    contexts: Words = (
        "everyday life",
        "engineering work",
        "a laboratory",
        "trade and money",
        "games and puzzles",
        "computing systems",
        "nature and climate",
        "an abstract setting without a story",
    )
    difficulties: Words = ("introductory", "undergraduate", "advanced", "competition")
    lengths: Words = ("two or three sentences", "one paragraph", "several paragraphs of detail")
    personas: Words = (
        "a patient teacher",
        "an examiner",
        "a practitioner with a task at work",
        "a curious hobbyist",
        "a researcher",
    )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChecksConfig:
    """Checks of problems and solutions.

    Args:
        problem: ask whether a problem needs its concept; if not, it is rewritten once.
        solution: verify solutions.
        solutions: independent solutions per coding or numeric problem; the majority decides.
        tests: tests to write for a coding problem.
        execution: run coding solutions in the sandbox, or not at all.
        sandbox: limits of one program.
        keep_unverified: let solutions through that could not be verified.
        tolerance: relative difference of two numbers that count as equal.
    """

    problem: bool = True
    solution: bool = True
    solutions: PositiveInt = 1
    tests: PositiveInt = 5
    execution: Literal["sandbox", "off"] = "sandbox"
    sandbox: Limits = dataclasses.field(default_factory=Limits)
    keep_unverified: bool = False
    tolerance: PositiveFloat = 1e-3


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NegativesConfig:
    """Hard negatives: texts of other concepts of the domain, and texts that the model writes.

    Args:
        source: nearest by BM25, or by the vectors of an export.
        export: with `dense`, the folder of the export.
        written: write one hard negative per problem, for rows of the kind p2ps-written.
        near_concepts: draw a name or definition from this many nearest ones.
        near_problems: draw a worked problem from this many nearest ones.
    """

    source: Literal["bm25", "dense"] = "bm25"
    export: UserPath | None = None
    written: bool = True
    near_concepts: PositiveInt = 2
    near_problems: PositiveInt = 8

    def __post_init__(self) -> None:
        require(
            (self.source == "dense") == (self.export is not None),
            "negatives.export",
            None if self.export is None else str(self.export),
            "the folder of an export with source: dense, and null with bm25",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RewritesConfig:
    """Queries in other forms: the share of the problems that get each.

    Args:
        forum: a question in a forum, written by the model.
        exam: an exam question, written by the model.
        long: the problem among texts of other concepts, `long_tokens` tokens in all.
    """

    forum: Share = 0.0
    exam: Share = 0.0
    long: Share = 0.0
    long_tokens: Annotated[int, Field(ge=64, description="tokens")] = 1024


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfig:
    """Proportions of the kinds of rows.

    Args:
        max_pairs: ordered pairs of problems per concept.
        rich_share: share of the pairs whose query is a worked problem or names its concept
            (ps2ps); the others have the problem alone (p2ps).
        definition_share: share of p2i rows that find the definition; the others find the name.
        p2i_negatives: rows per problem for p2i, each with another of the nearest negatives.
        held_out: share of the concepts of which nothing becomes a row.
    """

    max_pairs: NonNegativeInt = 20
    rich_share: Share = 0.25
    definition_share: Share = 0.5
    p2i_negatives: PositiveInt = 2
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Limits of the calls; all budgets count what the ledger holds, also from earlier starts.

    Args:
        concurrency: requests in flight.
        requests_per_minute: over all servers.
        tokens_per_minute: prompt and completion, over all servers.
        max_tokens: stop before this many tokens are used in all.
        max_cost: stop before this much money is spent in all, in the currency of `prices`.
        timeout: seconds for one request, from connecting to the last byte.
        attempts: tries of a request before its failure is recorded.
        patience: seconds without any server that answers, before the run stops.
    """

    concurrency: PositiveInt = 32
    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    max_tokens: PositiveInt | None = None
    max_cost: PositiveFloat | None = None
    timeout: PositiveFloat = 180.0
    attempts: PositiveInt = 6
    patience: PositiveFloat = 600.0


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PricesConfig:
    """Prices per million tokens, for the budget and the card.

    Args:
        batch_factor: the batch API's price relative to these.
    """

    prompt: NonNegativeFloat = 0.0
    completion: NonNegativeFloat = 0.0
    judge_prompt: NonNegativeFloat | None = None
    judge_completion: NonNegativeFloat | None = None
    batch_factor: Share = 0.5
    currency: str = "USD"


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Use of the batch API.

    Args:
        max_requests: requests in one batch.
        poll: seconds between two looks at a batch.
        window: completion window that the server is asked for.
        attempts: batches in which a request may expire before it counts as failed.
    """

    max_requests: Annotated[int, Field(ge=1, le=50000)] = 10000
    poll: PositiveFloat = 60.0
    window: str = "24h"
    attempts: PositiveInt = 3


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StrictConfig:
    """Thresholds; rows that miss one are not written. Null leaves a figure unchecked."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """From concepts to training rows: `python -m ReasonAug synthesize CONFIG`.

    Args:
        output_dir: everything that the run writes; `ledger/` below it holds the answers.
        seed: draws of options, proportions and negatives.
        api: one request at a time over HTTP, or batches at a lower price.
        prompts: a folder whose files replace the shipped prompts of the same names.
        domains: how the solutions of a domain are verified; ours are known, others are `text`.
        decontaminate: evaluation sets whose problems are dropped.
    """

    output_dir: UserPath
    model: ModelConfig
    concepts: ConceptsConfig
    seed: int = 0
    api: Literal["live", "batch"] = "live"
    prompts: UserPath | None = None
    domains: dict[str, Kind] = dataclasses.field(default_factory=dict)
    problems: ProblemsConfig = dataclasses.field(default_factory=ProblemsConfig)
    checks: ChecksConfig = dataclasses.field(default_factory=ChecksConfig)
    negatives: NegativesConfig = dataclasses.field(default_factory=NegativesConfig)
    rewrites: RewritesConfig = dataclasses.field(default_factory=RewritesConfig)
    rows: RowsConfig = dataclasses.field(default_factory=RowsConfig)
    decontaminate: DecontaminateConfig | None = None
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    prices: PricesConfig = dataclasses.field(default_factory=PricesConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    strict: StrictConfig = dataclasses.field(default_factory=StrictConfig)

    def __post_init__(self) -> None:
        priced = self.prices.prompt or self.prices.completion
        require(
            self.limits.max_cost is None or bool(priced),
            "limits.max_cost",
            self.limits.max_cost,
            "null without prices",
            "set prices.prompt and prices.completion",
        )
        if self.api == "batch":
            require(
                len(self.model.servers) == 1,
                "model.servers",
                [server.url for server in self.model.servers],
                "one server with api: batch",
            )

    def kind(self, domain: str) -> Kind:
        """Return the way in which solutions of a domain are verified."""
        return {**KINDS, **self.domains}.get(domain, "text")
