from __future__ import annotations

from pathlib import Path

import pytest

from ReasonAug.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ReasonAug", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_two_commands_make_data_and_replicas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, hub = tmp_path / "data", tmp_path / "hub"
    sizes = ("--problems-per-concept", "8", "--max-tokens", "400")
    assert run(monkeypatch, "templates", "--out", str(data), *sizes) == 0
    assert run(monkeypatch, "replicas", "--data", str(data), "--out", str(hub)) == 0
    assert "training rows" in capsys.readouterr().out
    assert (hub / "mteb" / "BRIGHT" / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problems-per-concept", "0"), "--problems-per-concept 0 | allowed: >= 8"),
        (("--max-tokens", "5"), "--max-tokens 5 | allowed: >= 300"),
    ],
)
def test_sizes_out_of_range_are_refused_with_one_line(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "templates", "--out", str(tmp_path / "out"), *arguments) == 2
    assert capsys.readouterr().err == f"UserError: {message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["templates", "replicas"])
def test_a_folder_that_cannot_be_made_is_refused_with_one_line(
    command: str,
    generated: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "out")
    data = () if command == "templates" else ("--data", str(generated))
    assert run(monkeypatch, command, *data, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"UserError: --out {out}: Not a directory")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "problems.jsonl:1: Expecting property name"),
        ('{"id": "a", "split": "train"}', "problems.jsonl:1 lacks concept"),
        ("", "has no row of split 'unseen_problems'"),
    ],
)
def test_replicas_refuse_data_that_templates_did_not_write(
    content: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "problems.jsonl").write_text(content)
    hub = str(tmp_path / "hub")
    assert run(monkeypatch, "replicas", "--data", str(tmp_path), "--out", hub) == 2
    assert message in capsys.readouterr().err
