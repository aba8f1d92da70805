"""The parts of a synthesis alone: answers, results, the ledger, concepts and programs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from ReasonAug.concepts import CONCEPTS
from ReasonAug.sandbox import Limits, Outcome
from ReasonAug.synthesis import execution
from ReasonAug.synthesis.answers import (
    UnreadableError,
    Verdict,
    WrittenProblem,
    WrittenTests,
    json_schema,
    read_answer,
)
from ReasonAug.synthesis.calls import Halt
from ReasonAug.synthesis.compare import same_result
from ReasonAug.synthesis.completions import read_reply
from ReasonAug.synthesis.concepts import concept_id, listed_concepts
from ReasonAug.synthesis.ledger import Ledger, Record, call_key
from ReasonAug.synthesis.prompts import Prompts
from ReasonAug.synthesis.solutions import (
    function_of,
    harness,
    read_outcome,
    source_of,
    usable_tests,
)
from tests.reasonaug.small_synthesis import config_of

# --- results ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("42", "42.0"),
        ("12.5 m/s", "45 km/h"),
        ("1,250", "1250"),
        (r"$\frac{3}{4}$", "0.75"),
        ("x = 3", "3"),
        ("25%", "0.25"),
        (r"\boxed{5\sqrt{2}}", "7.0711"),
        ("2x+1", "1 + 2*x"),
        ("(x+1)^2", "x^2+2x+1"),
        ("3.0 × 10^8 m/s", "300000000 m/s"),
        ("1.2 kJ", "1200 J"),
        ("5 N", "5 kg*m/s^2"),
        ("$1,234.50", "1234.5"),
        ("sqrt(2)/2", "1/sqrt(2)"),
        ("pi/4", "0.7854"),
        ("-3", "−3"),
        ("30°", "30 deg"),
        ("5 apples", "5"),
        ("Yes", "yes."),
        ("**42**", "42"),
    ],
)
def test_one_result_in_two_spellings_is_the_same(left: str, right: str) -> None:
    assert same_result(left, right, tolerance=1e-3)
    assert same_result(right, left, tolerance=1e-3)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("42", "43"),
        ("1 m", "1 km"),
        ("5 N", "5 J"),
        ("3 kg", "3 m"),
        ("x+1", "x-1"),
        ("yes", "no"),
        ("", "3"),
        # Neither evaluated nor computed for hours.
        ("9**9**9**9", "3"),
        ("__import__('os').getpid()", "3"),
        ("(1).__class__", "1"),
        ("(" * 5000 + "1", "1"),
    ],
)
def test_two_results_differ(left: str, right: str) -> None:
    assert not same_result(left, right, tolerance=1e-3)


# --- answers ---------------------------------------------------------------------------------

WHOLE = {"problem": 'How "many"?', "solution": "a\nb", "answer": "3"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(WHOLE),
        f"Sure, here it is:\n```json\n{json.dumps(WHOLE, indent=1)}\n```\nAnything else?",
        json.dumps(WHOLE)[:-1] + ",}",
        f"<think>maybe {{'a': 1}}</think>{json.dumps(WHOLE)} done",
        # A chat template has written the first tag.
        f"So {json.dumps({**WHOLE, 'answer': '2'})}? No.\n</think>\n\n{json.dumps(WHOLE)}",
        f"<thinking>{json.dumps({**WHOLE, 'answer': '2'})}</thinking>{json.dumps(WHOLE)}",
        json.dumps(WHOLE).replace("\\n", "\n"),
        json.dumps({**WHOLE, "answer": 3, "extra": None}),
    ],
)
def test_json_is_found_in_what_a_model_writes(text: str) -> None:
    assert read_answer(WrittenProblem, text) == WrittenProblem(**WHOLE)


def test_answers_in_words_are_read_where_they_have_a_usual_form() -> None:
    found = read_answer(WrittenProblem, "**Problem:**\nWhat?\n\n**Solution:**\nThat.")
    assert (found.problem, found.solution) == ("What?", "That.")
    assert read_answer(Verdict, "**Yes**, it does.").verdict is True
    assert read_answer(Verdict, '{"verdict": "No", "reason": "x"}').verdict is False


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"$\frac{1}{2} \times \beta$", None),
        (r"$\rho \approx \sqrt{2} \cdot \alpha$ \(x \neq y\)", None),
        (r"as $x \to 0$, $\tan\theta = \nu$ and \text{so}", None),
        (r"\underline{u}, \nabla\cdot E and a word\b", None),
        (r"it\'s", "it's"),
        # Whoever doubles backslashes is read as before, and so are line breaks and tabs of code.
        (r"$\\frac{1}{2} \\times \\beta$", r"$\frac{1}{2} \times \beta$"),
        (r"def f(x):\n\ttext = x\n\treturn \"\u00e9\"\r\n", 'def f(x):\n\ttext = x\n\treturn "é"'),
        (r"a\nu = 3\nto x\nneq\n\tan = 1", "a\nu = 3\nto x\nneq\n\tan = 1"),
    ],
)
def test_backslashes_that_a_model_did_not_double_stay(written: str, meant: str | None) -> None:
    """JSON would read a form feed and `rac`, or nothing at all."""
    found = read_answer(WrittenProblem, f'{{"problem": "{written}", "solution": "s"}}')
    assert found.problem == (written if meant is None else meant)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (WrittenProblem, f"<think>Perhaps {json.dumps(WHOLE)}, but"),
        (WrittenProblem, "**Problem**\nWhat?\n\n**Solution**\nFirst, we"),
        (WrittenProblem, json.dumps(WHOLE)[:-5]),
        (Verdict, "Yes, because"),
    ],
)
def test_an_answer_that_is_cut_off_is_whole_json_or_nothing(kind: type[Any], text: str) -> None:
    with pytest.raises(UnreadableError):
        read_answer(kind, text, is_cut=True)
    whole = json.dumps({**WHOLE, "verdict": True})
    assert read_answer(kind, whole + " " * 100, is_cut=True)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (WrittenProblem, '{"problem": "a", "solution": "cut', "cut short"),
        (WrittenProblem, '{"problem": "a", "solution": ""}', "'solution' is missing or empty"),
        (WrittenProblem, '{"problem": ["a"], "solution": "b"}', "'problem' is missing"),
        (Verdict, "Perhaps.", "no JSON object"),
        (WrittenTests, '{"tests": "assert f(1)"}', "'tests' is missing"),
    ],
)
def test_an_answer_that_lacks_something_is_unreadable(
    kind: type[Any], text: str, message: str
) -> None:
    with pytest.raises(UnreadableError, match=message):
        read_answer(kind, text)


def test_a_schema_is_strict() -> None:
    assert json_schema(WrittenTests) == {
        "type": "object",
        "properties": {"tests": {"type": "array", "items": {"type": "string"}}},
        "required": ["tests"],
        "additionalProperties": False,
    }


# --- replies ---------------------------------------------------------------------------------


def test_parts_of_a_reply_are_one_text_without_thoughts() -> None:
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "4"},
        {"type": "text", "text": "2"},
    ]
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    reply = read_reply({"choices": [choice], "usage": {"prompt_tokens": 5}})
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("42", 5, None)
    usage = {"prompt_tokens": -1, "completion_tokens": "many"}
    reply = read_reply({"choices": [choice], "usage": usage})
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, None)


@pytest.mark.parametrize(
    "tree",
    [
        *(None, [], {}, {"choices": []}),
        *({"choices": [choice]} for choice in ({}, {"message": None}, {"message": "text"})),
        *({"choices": [{"message": {"content": content}}]} for content in (3, [1], ["text"])),
    ],
)
def test_a_tree_of_another_form_is_no_reply(tree: Any) -> None:
    with pytest.raises(ValueError):
        read_reply(tree)


# --- prompts ---------------------------------------------------------------------------------


def test_a_changed_prompt_has_another_version_and_the_others_keep_theirs(tmp_path: Path) -> None:
    (tmp_path / "form-numeric.md").write_text("Answer with a number.\n")
    shipped, own = Prompts().versions(), Prompts(tmp_path).versions()
    changed = {name for name in shipped if shipped[name] != own[name]}
    assert changed == {"problem numeric", "rewrite numeric"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("check.md", "Is it {concept}?", "no text under a heading '# User'"),
        ("check.md", "# User\nIs it {domain}?", r"\{domain\} is not known"),
        ("chek.md", "# User\nIs it?", "allowed: check.md"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Prompts(tmp_path)


def test_braces_of_values_and_prompts_stay(tmp_path: Path) -> None:
    (tmp_path / "exam.md").write_text('# User\n{problem} {"question": "…"} \\frac{a}{b}')
    messages = Prompts(tmp_path).get("exam").messages({"problem": "{1, 2} {concept}"})
    assert messages == [
        {"role": "user", "content": '{1, 2} {concept} {"question": "…"} \\frac{a}{b}'}
    ]


# --- the ledger ------------------------------------------------------------------------------


def record(number: int, **more: Any) -> Record:
    key = call_key(model="m", version="1", parameters={}, values={"n": number})
    given = {"item": "a", "status": "ok", "model": "m", "prompt": "p@1", "parameters": {}}
    return Record(key=key, **{**given, "answer": f"ä {number}\u2028", **more})


def test_half_a_last_line_is_cut_off_and_everything_before_it_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "problems.jsonl"
    with Ledger.open(tmp_path) as ledger:
        for number in range(3):
            ledger.stage("problems").append(record(number))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        with Ledger.open(tmp_path) as ledger:
            stage = ledger.stage("problems")
            assert [stage.find(record(n).key) for n in range(3)] == [record(0), record(1), None]
            stage.append(record(2))
        assert path.read_bytes() == whole
    assert "half an answer at its end" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"{}\n", b'{"key": "zz"}\n', b"\xff\n", b"[1]\n"])
def test_a_damaged_line_is_named(damage: bytes, tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        ledger.stage("problems").append(record(1))
    path = tmp_path / "problems.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    with (
        pytest.raises(UserError, match=r"problems\.jsonl:2: damaged"),
        Ledger.open(tmp_path),
    ):
        pass


def test_of_two_records_with_one_key_the_later_counts(tmp_path: Path) -> None:
    for answer in ("first", "second"):
        with Ledger.open(tmp_path) as ledger:
            ledger.stage("problems").append(record(1, answer=answer))
    with Ledger.open(tmp_path) as ledger:
        found = ledger.stage("problems").find(record(1).key)
        assert found is not None and found.answer == "second"


# --- concepts --------------------------------------------------------------------------------


def listed(tmp_path: Path, *files: Path, **section: Any) -> list[tuple[str, str]]:
    given = {"files": [str(path) for path in files], **section}
    config = config_of(tmp_path / "out", "http://h/v1", concepts=given)
    return [(item["domain"], item["concept"]) for item in listed_concepts(config)]


def test_concepts_are_read_from_all_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeff# names\nBayes' Theorem\n\nphysics\tSnell's Law\r\n")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"domain": "math", "concept": "Vieta", "definition": "It says so."}) + "\n"
    )
    (tmp_path / "c.yaml").write_text("law:\n  - Estoppel\n  - {concept: Trust, definition: T}\n")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.yaml")]
    found = [
        *(("math", "Bayes' Theorem"), ("physics", "Snell's Law")),
        *(("math", "Vieta"), ("law", "Estoppel"), ("law", "Trust")),
    ]
    assert listed(tmp_path, *files, domain="math") == found
    assert len(listed(tmp_path, *files, domain="math", builtin=True)) == 5 + len(CONCEPTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "Bayes\n", "'Bayes' has no domain"),
        ("a.txt", "# only a comment\n", "no concept in it"),
        ("a.csv", "x", r"allowed: a file \.txt, \.jsonl, \.yaml or \.yml"),
        ("a.yaml", "- Bayes\n", "list at the top"),
        ("a.yaml", "math: Bayes\n", "math: str"),
        ("a.yaml", "math: [3]\n", "math: entry 1"),
        ("a.jsonl", '{"domain": "math"}\n', "'concept' is NoneType"),
        ("a.jsonl", '{"domain": "math", "concept": " "}\n', "entry 1"),
    ],
)
def test_a_list_of_concepts_of_another_form_is_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        listed(tmp_path, tmp_path / name)


def test_names_that_differ_in_case_and_punctuation_are_one_concept() -> None:
    assert concept_id("math", "Bayes' Theorem") == concept_id("Math", "bayes’  theorem")
    assert concept_id("math", "Bayes") != concept_id("law", "Bayes")
    # Names that no ASCII letter is part of stay apart.
    assert concept_id("math", "素数定理") != concept_id("math", "中国剩余定理")


# --- programs --------------------------------------------------------------------------------


def run_here(source: str, tests: list[str]) -> list[bool] | None:
    """Run a harness in this process: its programs are ours."""
    import contextlib
    import io

    text, mark = harness(source, tests)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text, "harness", "exec"), {"__name__": "__main__"})
    return read_outcome(out.getvalue(), mark, len(tests))


def test_a_harness_says_which_tests_a_program_passes() -> None:
    source = "import sys\nprint('outcome: [true]')\ndef f(x):\n    print(x)\n    return x + 1"
    tests = ["assert f(1) == 2", "assert f(1) == 3", "assert f('a')", "assert f(2) == 3"]
    assert run_here(source, tests) == [True, False, False, True]
    assert run_here("def f(x: return", tests) == [False] * 4
    assert run_here("import sys\nsys.exit(0)", tests) == [False] * 4
    assert read_outcome("nothing", "mark", 4) is None


def test_only_assertions_about_the_function_are_tests() -> None:
    given = ["assert f(1) == 2", "```python\nassert f(2) == 3\n```", "print(f(1))", "assert True"]
    found = usable_tests([*given, "assert g(1)", "f(", "assert f(1) == 2"], "f")
    assert found == ["assert f(1) == 2", "assert f(2) == 3"]


def test_the_function_of_a_program_is_the_named_one_or_the_last() -> None:
    source = source_of("Here:\n```python\ndef helper(x):\n    return x\n\ndef f(x):\n    pass\n```")
    assert source.startswith("def helper") and source.endswith("pass")
    assert function_of(source, "`helper(x)`") == "helper"
    assert function_of(source, "unknown") == "f"
    assert function_of("def f(", "f") is None


def test_a_program_that_met_a_limit_is_run_again_under_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome depends on the limits, so a record of other limits is none."""
    given: list[Limits] = []

    def run_program(source: str, *, limits: Limits) -> Outcome:
        given.append(limits)
        return Outcome(
            reason="time", exit_code=-9, stdout="", stderr="", seconds=1.0, cpu_seconds=1.0
        )

    monkeypatch.setattr(execution, "run_program", run_program)
    larger = Limits(memory_mb=1024)
    with Ledger.open(tmp_path) as ledger:
        for limits in (Limits(), Limits(), larger, larger, Limits()):
            runs = execution.RecordedExecution(ledger, Halt(), limits=limits, dry_run=False)
            asyncio.run(runs.passed("item", "def f(): pass", ["assert f()"]))
    assert given == [Limits(), larger]
