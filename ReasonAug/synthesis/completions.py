"""Write requests for chat completions, and read what comes back: text, refusal, cut, tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from ReasonAug.synthesis.calls import Call, Secrets, refused
from ReasonAug.synthesis.ledger import CUT_OFF, Record

_CHARACTERS_PER_TOKEN = 3  # fewer than usual, so that a budget is not passed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The content of a chat completion.

    Args:
        is_cut: it ends because it reached the token limit.
        prompt_tokens: None if the server does not count them.
        completion_tokens: likewise.
    """

    text: str
    refusal: str
    is_cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def is_empty(self) -> bool:
        """True if there is nothing in it, and no reason why."""
        return not (self.text or self.refusal or self.is_cut)

    def tokens(self, call: Call[Any]) -> Tokens:
        """Return the tokens of prompt and completion, estimated if the server does not say."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if completion is None:
            written = -(-len(self.text) // _CHARACTERS_PER_TOKEN)
            completion = call.max_tokens if self.is_cut else written
        return Tokens(estimate_tokens(call) if prompt is None else prompt, completion)


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a call, over all of its tries that were answered."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    @property
    def total(self) -> int:
        """Their sum."""
        return self.prompt + self.completion


def read_reply(tree: Any) -> Reply:
    """Return the content of a chat completion.

    Raises:
        ValueError: it has no choice, or is none.
    """
    try:
        choice = tree["choices"][0]
        message = choice["message"]
        usage = tree.get("usage") or {}
        text = message.get("content")
        if isinstance(text, list):  # parts, of which some are thoughts
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is not None and not isinstance(text, str):
            raise ValueError("its content is no text")
        refusal = message.get("refusal") or ""
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "content filter"
        return Reply(
            text=text or "",
            refusal=str(refusal),
            is_cut=choice.get("finish_reason") == "length",
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer in it ({type(error).__name__}: {error})") from None


def _count(value: Any) -> int | None:
    """Return a server's count of tokens; None for anything else."""
    return value if isinstance(value, int) and value >= 0 else None


def outcome(
    call: Call[Any], reply: Reply, secrets: Secrets, *, lost: Tokens = Tokens(), **more: Any
) -> Record:
    """Return the record of a call that was answered or refused.

    Args:
        call: the call.
        reply: its answer.
        secrets: are not recorded.
        lost: tokens of earlier tries whose answers were empty.
        more: fields of the record.
    """
    if reply.refusal:
        more |= {"status": "failed", "reason": refused(secrets.redact(reply.refusal)[:300])}
    elif reply.is_cut and not reply.text:
        more |= {"status": "failed", "reason": CUT_OFF}
    else:
        more |= {"status": "ok", "answer": secrets.redact_answer(reply.text)}
        more |= {"reason": CUT_OFF} if reply.is_cut else {}
    used = reply.tokens(call) + lost
    return call.record(prompt_tokens=used.prompt, completion_tokens=used.completion, **more)


def body_of(call: Call[Any], mode: str) -> dict[str, Any]:
    """Return the body of a request for a chat completion."""
    body: dict[str, Any] = {
        "model": call.model,
        "messages": call.messages(),
        "temperature": call.temperature,
        call.token_limit_key: call.max_tokens,
        **call.extra,
    }
    body = {name: value for name, value in body.items() if value is not None}
    if mode == "schema":
        schema = {"name": call.answer.__name__, "strict": True, "schema": call.schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif mode == "object":
        body["response_format"] = {"type": "json_object"}
    return body


def estimate_tokens(call: Call[Any]) -> int:
    """Return about how many tokens a prompt has, rather too many than too few."""
    return sum(len(m["content"]) for m in call.messages()) // _CHARACTERS_PER_TOKEN + 16
