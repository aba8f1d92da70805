"""A forked process is what a started one would be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import forks
from tests.support import PATIENCE, launch_ranks

# A step of a model with dropout on each rank, and what a process knows of itself.
SCRIPT = """
import os, sys
import deepspeed, numpy, torch
from huggingface_hub import constants
from transformers import Qwen2Config, Qwen2ForCausalLM
from pipeline import comm
from pipeline.launch import discover_world

def main():
    comm.start(discover_world(), timeout_seconds=60)
    print(__name__, sys.argv[1:], sys.path[0], os.getcwd(), os.environ["RANK"])
    print(torch.get_num_threads(), constants.HF_HUB_OFFLINE)
    torch.manual_seed(0)
    print(deepspeed.accelerator.get_accelerator().device_name(), sys.modules["__main__"].__file__)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, attention_dropout=0.1))
    ids = torch.randint(300, (2, 16)) + comm.rank()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
    norm = sum(p.grad.double().square().sum() for p in model.parameters())
    print(loss.item().hex(), norm.item().hex())
    comm.leave(0, gracefully=True)

if __name__ == "__main__":
    main()
"""


def test_forked_ranks_print_and_compute_what_started_ranks_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    # Whole runs on two ranks are compared in test_kills.py and test_two_hosts.py.
    forked = launch_ranks(1, script, "word")
    monkeypatch.setenv("DIFFEMBED_TEST_FORKS", "0")
    assert launch_ranks(1, script, "word") == forked
    assert forked.splitlines()[0] == f"__main__ ['word'] {tmp_path} {Path.cwd()} 0"


def test_clients_that_are_killed_at_any_moment_end_no_other_process(tmp_path: Path) -> None:
    """As elements of a job array are, between their request and its answer."""
    server = forks._server_for({**os.environ, **forks.ENVIRONMENT})
    if server is None:
        pytest.skip("processes are not forked here")
    request = {"words": ["-c", "import time; time.sleep(600)"], "folder": str(tmp_path)}
    for asks in [False, True] * 5:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(f"\0diffembed-forks-{server.run}")
            if asks:
                client.recv(2**20)
                read, write = os.pipe()
                os.close(read)
                words = json.dumps({**request, "environment": dict(os.environ)}).encode()
                socket.send_fds(client, [words], [write, write, write])
                os.close(write)

    done = forks.run(["-c", "print('served')"], folder=tmp_path, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "served\n")


@pytest.mark.parametrize("forked", [True, False])
@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("print('done')", 0, ""),
        ("import sys; print('done'); sys.exit(7)", 7, ""),
        ("print('done'); raise SystemExit('no')", 1, "no\n"),
        ("print('done', flush=True); import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'done')", 0, ""),
        ("import threading; threading.Timer(0.1, print, ['done']).start()", 0, ""),
    ],
)
def test_exit_codes_and_streams_are_those_of_python(
    code: str,
    exit_code: int,
    stderr: str,
    forked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIFFEMBED_TEST_FORKS", str(int(forked)))
    done = forks.run(["-c", code], folder=tmp_path, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, "done\n", stderr)


def test_an_uncaught_error_is_shown_and_ends_with_1(tmp_path: Path) -> None:
    done = forks.run(["-c", "1 / 0"], folder=tmp_path, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_process_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    )
    with tempfile.TemporaryFile("w+") as stdout:
        process = forks.Process(["-c", f"{code}; p.wait()"], folder=tmp_path, stdout=stdout)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        while not stdout.seek(0, 2):
            assert process.poll() is None
        process.kill()
        assert process.wait(PATIENCE) == -9
        stdout.seek(0)
        state = Path(f"/proc/{int(stdout.read())}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_random_numbers_differ_from_process_to_process(tmp_path: Path) -> None:
    """As after a real start: no rank agrees with another one by accident."""
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1))"
    drawn = [forks.run(["-c", code], folder=tmp_path, timeout=PATIENCE).stdout for _ in range(2)]
    for first, second in zip(*(text.split() for text in drawn), strict=True):
        assert first != second


def test_variables_that_libraries_read_at_import_are_those_of_a_started_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both a variable that the server has read and one that it lacks."""
    code = "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME)"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = forks.run(["-c", code], folder=tmp_path, timeout=PATIENCE)
    assert done.stdout == f"True {tmp_path}\n", done.stderr
