"""Configure a synthesis: model, concepts, stages, limits and prices.

Keys of servers never stand here: `api_key_env` names the environment variable that holds one.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config import DecontaminateConfig
from pipeline.config.loading import UserPath, require, strict
from pipeline.errors import UserError
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
    """One OpenAI-compatible server."""

    url: str
    """Its base URL, usually ending in /v1."""
    api_key_env: str | None = None
    """The environment variable with its key; null if it needs none."""

    def __post_init__(self) -> None:
        name = self.api_key_env
        # The value is not shown: somebody may have put the key itself here.
        require(
            name is None or re.fullmatch("[A-Z_][A-Z0-9_]{0,63}", name) is not None,
            "api_key_env",
            "a text that names no variable",
            "the name of an environment variable in capitals, or null",
        )
        try:
            parts = urlsplit(self.url)
            host = parts.hostname if parts.port != 0 else None
        except ValueError as error:
            # Not the URL itself, which may hold a key.
            raise UserError(f"url: {error}", allowed="http://HOST:PORT/v1") from None
        # A key in a URL would end in logs and in the ledger; the message must not show it either.
        shown = f"{parts.scheme}://{host or ''}"
        is_web = parts.scheme in ("http", "https") and bool(host)
        require(is_web, "url", shown, "http://HOST:PORT/v1, or https://…")
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
    """The model that writes, and its servers."""

    name: Annotated[str, Field(min_length=1)]
    """As the servers know it."""
    judge: str | None = None
    """Another model of the same servers, for the checks; by default the same one."""
    servers: tuple[ServerConfig, ...] = ()
    """Tried in turn; one that does not answer is left out for a while. None: a Slurm job starts
    them."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    """Of calls that write, and of independent solutions."""
    judge_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Of checks."""
    max_tokens: PositiveInt = 2048
    """The longest answer."""
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which the servers know `max_tokens`."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further parameters of each request, such as `reasoning_effort: low`; null leaves one out that
    is sent by default, such as `temperature: null`.
    """
    structured: Literal["auto", "schema", "object", "none"] = "auto"
    """Ask for answers by JSON schema, as a JSON object, or in words only; `auto` starts with
    the schema and falls back if a server refuses it.
    """
    licence: str = ""
    """Licence of the model's outputs, for the card."""

    def __post_init__(self) -> None:
        owned = {"model", "messages", "response_format", "stream", "n", self.token_limit_key}
        for key in self.extra:
            require(
                key not in owned,
                f"model.extra.{key}",
                "given",
                "parameters that no other key of this config sets",
            )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProposeConfig:
    """Concepts of a domain that the model proposes until there are `count`."""

    domain: Annotated[str, Field(min_length=1)]
    """The domain, in the words of the prompt."""
    count: PositiveInt
    """Concepts to end with, in addition to listed ones."""
    per_call: PositiveInt = 25
    """Names to ask for in one call."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConceptsConfig:
    """The concepts to write problems about; lists of all origins are joined."""

    files: tuple[UserPath, ...] = ()
    """.txt (a name per line, or DOMAIN tab NAME), .jsonl (domain, concept and, if there is one,
    definition), .yaml (domain: list of names).
    """
    domain: str = ""
    """Domain of names in .txt files."""
    builtin: bool = False
    """Add the concepts of `python -m ReasonAug templates`, with their definitions."""
    propose: tuple[ProposeConfig, ...] = ()
    """Domains for which the model proposes concepts."""
    max_similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Two definitions of at least this Jaccard similarity are one concept."""
    max_count: PositiveInt | None = None
    """Use only this many, from the start."""

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
    """Problems to write about each concept."""
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
    """Settings of a problem."""
    difficulties: Words = ("introductory", "undergraduate", "advanced", "competition")
    """Levels of a problem."""
    lengths: Words = ("two or three sentences", "one paragraph", "several paragraphs of detail")
    """Lengths of a problem's text."""
    personas: Words = (
        "a patient teacher",
        "an examiner",
        "a practitioner with a task at work",
        "a curious hobbyist",
        "a researcher",
    )
    """Authors of a problem."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChecksConfig:
    """Checks of problems and solutions."""

    problem: bool = True
    """Ask whether a problem needs its concept; if not, it is rewritten once."""
    solution: bool = True
    """Verify solutions."""
    solutions: PositiveInt = 1
    """Independent solutions per coding or numeric problem; the majority decides."""
    tests: PositiveInt = 5
    """Tests to write for a coding problem."""
    execution: Literal["sandbox", "off"] = "sandbox"
    """Run coding solutions in the sandbox, or not at all."""
    sandbox: Limits = dataclasses.field(default_factory=Limits)
    """Limits of one program."""
    keep_unverified: bool = False
    """Let solutions through that could not be verified."""
    tolerance: PositiveFloat = 1e-3
    """Relative difference of two numbers that count as equal."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NegativesConfig:
    """Hard negatives: texts of other concepts of the domain, and texts that the model writes."""

    source: Literal["bm25", "dense"] = "bm25"
    """Nearest by BM25, or by the vectors of an export."""
    export: UserPath | None = None
    """With `dense`, the folder of the export."""
    written: bool = True
    """Write one hard negative per problem, for rows of the kind p2ps-written."""
    near_concepts: PositiveInt = 2
    """Draw a name or definition from this many nearest ones."""
    near_problems: PositiveInt = 8
    """Draw a worked problem from this many nearest ones."""

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
    """Queries in other forms: the share of the problems that get each."""

    forum: Share = 0.0
    """A question in a forum, written by the model."""
    exam: Share = 0.0
    """An exam question, written by the model."""
    long: Share = 0.0
    """The problem among texts of other concepts, `long_tokens` tokens in all."""
    long_tokens: Annotated[int, Field(ge=64, description="tokens")] = 1024
    """Length of a long query, in words and symbols."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfig:
    """Proportions of the kinds of rows."""

    max_pairs: NonNegativeInt = 20
    """Ordered pairs of problems per concept."""
    rich_share: Share = 0.25
    """Share of the pairs whose query is a worked problem or names its concept (ps2ps); the
    others have the problem alone (p2ps).
    """
    definition_share: Share = 0.5
    """Share of p2i rows that find the definition; the others find the name."""
    p2i_negatives: PositiveInt = 2
    """Rows per problem for p2i, each with another of the nearest negatives."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the concepts of which nothing becomes a row."""
    hub: UserPath | None = None
    """Folder for a BRIGHT replica whose queries are the problems of these concepts."""

    def __post_init__(self) -> None:
        require(
            self.hub is None or self.held_out > 0,
            "rows.hub",
            str(self.hub),
            "null without concepts held out",
            "set rows.held_out, for example to 0.25",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Limits of the calls; all budgets count what the ledger holds, also from earlier starts."""

    concurrency: PositiveInt = 32
    """Requests in flight."""
    requests_per_minute: PositiveFloat | None = None
    """Over all servers."""
    tokens_per_minute: PositiveFloat | None = None
    """Prompt and completion, over all servers."""
    max_tokens: PositiveInt | None = None
    """Stop before this many tokens are used in all."""
    max_cost: PositiveFloat | None = None
    """Stop before this much money is spent in all, in the currency of `prices`."""
    timeout: PositiveFloat = 180.0
    """Seconds for one request, from connecting to the last byte."""
    attempts: PositiveInt = 6
    """Tries of a request before its failure is recorded."""
    patience: PositiveFloat = 600.0
    """Seconds without an answering server after which the run stops."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PricesConfig:
    """Prices per million tokens, for the budget and the card."""

    prompt: NonNegativeFloat = 0.0
    """Of the model, per million tokens."""
    completion: NonNegativeFloat = 0.0
    """Of the model, per million tokens."""
    judge_prompt: NonNegativeFloat | None = None
    """Of the judge; by default the model's."""
    judge_completion: NonNegativeFloat | None = None
    """Of the judge; by default the model's."""
    batch_factor: Share = 0.5
    """The batch API's price relative to these."""
    currency: str = "USD"
    """Its name in messages."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Use of the batch API."""

    max_requests: Annotated[int, Field(ge=1, le=50000)] = 10000
    """Requests in one batch."""
    poll: PositiveFloat = 60.0
    """Seconds between two looks at a batch."""
    window: str = "24h"
    """Completion window that the server is asked for."""
    attempts: PositiveInt = 3
    """Batches in which a request may expire before it counts as failed."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StrictConfig:
    """Thresholds; rows that miss one are not written. Null leaves a figure unchecked."""

    min_yield: Share | None = None
    """Share of written problems that are kept."""
    min_agreement: Share | None = None
    """Share of second solutions and verdicts that agree with the first."""
    min_passed: Share | None = None
    """Share of the coding solutions that were run and passed all tests."""
    max_leakage: Share | None = None
    """Share of rows whose query and positive both name the concept, among kinds of rows whose query
    should not."""
    max_named: Share | None = None
    """Share of kept problems that name their concept."""
    max_near_duplicates: Share | None = None
    """Share of kept problems that nearly repeat an earlier one."""
    min_distinct_2: Share | None = None
    """Share of distinct word pairs in 20,000 words of problems, or in as many as there are."""
    max_self_bleu: Annotated[float, Field(ge=0, le=100)] | None = None
    """Mean BLEU (0 to 100) of a problem against the others of a sample."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """The report on a data set."""

    reference: UserPath | None = None
    """Generations (JSONL of domain, concept, generation, check) to compare with."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """From concepts to training rows: `python -m ReasonAug synthesize CONFIG`."""

    output_dir: UserPath
    """Everything that the run writes; `ledger/` below it holds the answers."""
    model: ModelConfig
    """The model and its servers."""
    concepts: ConceptsConfig
    """The concepts to write about."""
    seed: int = 0
    """Draws of options, proportions and negatives."""
    api: Literal["live", "batch"] = "live"
    """One request at a time over HTTP, or batches at a lower price."""
    prompts: UserPath | None = None
    """A folder whose files replace the shipped prompts of the same names."""
    domains: dict[str, Kind] = dataclasses.field(default_factory=dict)
    """How the solutions of a domain are verified; ours are known, others are `text`."""
    problems: ProblemsConfig = dataclasses.field(default_factory=ProblemsConfig)
    """How many problems, and their options."""
    checks: ChecksConfig = dataclasses.field(default_factory=ChecksConfig)
    """Checks of problems and solutions."""
    negatives: NegativesConfig = dataclasses.field(default_factory=NegativesConfig)
    """Hard negatives."""
    rewrites: RewritesConfig = dataclasses.field(default_factory=RewritesConfig)
    """Queries in other forms."""
    rows: RowsConfig = dataclasses.field(default_factory=RowsConfig)
    """Proportions of the kinds of rows."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation sets whose problems are dropped."""
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    """Limits and budgets of the calls."""
    prices: PricesConfig = dataclasses.field(default_factory=PricesConfig)
    """Prices of tokens."""
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    """Use of the batch API."""
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    """The report on the data."""
    strict: StrictConfig = dataclasses.field(default_factory=StrictConfig)
    """Thresholds below which no rows are written."""

    def __post_init__(self) -> None:
        priced = self.prices.prompt or self.prices.completion
        require(
            self.limits.max_cost is None or bool(priced),
            "limits.max_cost",
            self.limits.max_cost,
            "null without prices",
            "set prices.prompt and prices.completion",
        )
        # Found now, not when all answers are paid for.
        unmeasured = {
            "min_passed": not self.checks.solution or self.checks.execution == "off",
            "min_agreement": not self.checks.solution,
        }
        for key, missing in unmeasured.items():
            value = getattr(self.strict, key)
            allowed = "null with checks.solution: false or checks.execution: off"
            require(value is None or not missing, f"strict.{key}", value, allowed)
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
