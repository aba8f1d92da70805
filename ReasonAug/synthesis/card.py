"""Write the card of a finished data set, its summary, and the page of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import SANDBOX, Usage
from ReasonAug.synthesis.limits import prices_of
from ReasonAug.synthesis.rows import RowCounts

Stages = Mapping[str, Mapping[str, Counter[str]]]
_SAMPLE_CHARACTERS = 1500


def summarise(
    config: SynthesisConfig,
    stages: Stages,
    usage: Mapping[str, Mapping[tuple[str, str, str], Usage]],
    counts: RowCounts,
) -> dict[str, Any]:
    """Return counts by stage and domain, rows by kind, calls, tokens and cost."""
    return {
        "model": config.model.name,
        "judge": config.model.judge or config.model.name,
        "seed": config.seed,
        "stages": {
            stage: {domain: dict(sorted(fates.items())) for domain, fates in domains.items()}
            for stage, domains in stages.items()
        },
        "calls": {stage: _calls(config, found) for stage, found in usage.items() if found},
        "rows": dict(sorted(counts.rows.items())),
        "rows_by_domain": {domain: dict(sorted(c.items())) for domain, c in counts.domains.items()},
        "concepts": dict(counts.concepts),
        "held_out_concepts": counts.held_out,
        "domains_without_rows": counts.skipped_domains,
        "concepts_with_one_problem": counts.without_pair,
    }


def _calls(
    config: SynthesisConfig, usage: Mapping[tuple[str, str, str], Usage]
) -> dict[str, float | int]:
    asked = {key: used for key, used in usage.items() if key[0] != SANDBOX}
    cost = sum(
        prices_of(config, model, origin).cost(used.prompt_tokens, used.completion_tokens)
        for (model, origin, _), used in asked.items()
    )
    return {
        "answers": sum(used.calls for used in asked.values()),
        "failed": sum(used.failed for used in asked.values()),
        "prompt_tokens": sum(used.prompt_tokens for used in asked.values()),
        "completion_tokens": sum(used.completion_tokens for used in asked.values()),
        "cost": round(cost, 6),
        "programs_run": sum(used.calls for key, used in usage.items() if key[0] == SANDBOX),
    }


def card(config: SynthesisConfig, summary: Mapping[str, Any], sample: str) -> str:
    """Return the README of the data."""
    calls = summary["calls"].values()
    tokens = sum(c["prompt_tokens"] + c["completion_tokens"] for c in calls)
    cost = sum(c["cost"] for c in calls)
    rows = sum(summary["rows"].values())
    licence = config.model.licence or "not stated; check the terms of the model before sharing"
    lines = [
        "# Synthetic retrieval data",
        "",
        f"{rows:,} training rows over {sum(summary['concepts'].values()):,} concepts, written by "
        f"`{summary['model']}` and checked by `{summary['judge']}`; "
        f"{tokens:,} tokens, {cost:.2f} {config.prices.currency}.",
        "Made with `python -m ReasonAug synthesize`; `config.yaml` and `ledger/` make it again.",
        "",
        f"Licence of the model's outputs: {licence}.",
        "",
        "## Rows",
        "",
        *table(("kind", "rows"), sorted(summary["rows"].items())),
        "",
        "## Yield",
        "",
        *table(("stage", "domain", "kept", "dropped"), _yields(summary["stages"])),
        "",
        "## Calls",
        "",
        *table(
            ("stage", "answers", "failed", "prompt tokens", "completion tokens", "cost"),
            [
                (
                    stage,
                    *(c[name] for name in ("answers", "failed")),
                    *(c[name] for name in ("prompt_tokens", "completion_tokens")),
                    f"{c['cost']:.4f}",
                )
                for stage, c in summary["calls"].items()
            ],
        ),
        "",
        "## Sample",
        "",
        sample,
    ]
    return "\n".join(lines) + "\n"


def _yields(stages: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[tuple[Any, ...]]:
    return [
        (
            stage,
            domain,
            fates.get("kept", 0),
            ", ".join(f"{count} {fate}" for fate, count in fates.items() if fate != "kept") or "0",
        )
        for stage, domains in stages.items()
        for domain, fates in domains.items()
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sample_page(items: Iterable[Mapping[str, Any]]) -> str:
    """Return problems with solutions and checks, for a reader."""
    pages = []
    for item in items:
        checked = item.get("verification") or {}
        verdict = {True: "accepted", False: "rejected", None: "not verified"}[
            checked.get("accepted")
        ]
        options = ", ".join(item["options"].values())
        page = [
            f"### {item['concept']} ({item['domain']})",
            f"*{options}*",
            f"Outcome: {item['dropped'] or 'kept'}; solution {verdict} "
            f"({checked.get('method', 'none')})",
            _quoted("Problem", item["problem"]),
            _quoted("Solution", item["solution"]),
        ]
        for form in ("forum", "exam"):
            if text := (item.get("rewrites") or {}).get(form):
                page.append(_quoted(f"As {form}", text))
        if written := item.get("written_negative"):
            text = f"{written['problem']}\n\n{written['solution']}"
            page.append(_quoted(f"Hard negative ({written['concept']})", text))
        pages.append("\n\n".join(page))
    return "\n\n".join(pages)


def _quoted(title: str, text: str) -> str:
    if len(text) > _SAMPLE_CHARACTERS:
        text = text[:_SAMPLE_CHARACTERS] + " …"
    # A fence longer than any in the text.
    fence = "`" * (3 + text.count("```"))
    return f"**{title}**\n\n{fence}text\n{text}\n{fence}"
