"""Trials: command, target and damage are drawn from a seed and a number, run, and judged."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.damage import world
from tests.damage.commands import COMMANDS, Command, draw, run
from tests.damage.damages import Damage, damage_config, damage_file
from tests.damage.judge import judge, snapshot
from tests.damage.processes import run_child

# Seconds after which a command hangs; one takes a second on an idle machine.
_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Fuzzer:
    """The undamaged world, what each command concludes in it, and room for trials."""

    scratch: Path
    seed: int

    @property
    def whole(self) -> Path:
        return self.scratch / "world"

    def build(self) -> None:
        """Make the world by running the commands on undamaged inputs."""
        self.whole.mkdir(parents=True)
        world.write_inputs(self.whole)
        output = self._output("build")
        for name, stage in world.STAGES.items():
            ended = run_child(self.whole, output, stage.work, 10 * _SECONDS)
            if ended.code != stage.code:
                raise RuntimeError(f"{name}: exit code {ended.code}\n{ended.stdout}{ended.stderr}")

    def conclude(self, name: str) -> dict[str, Any]:
        """The results of a command in the undamaged world; written for the trials to compare."""
        command = COMMANDS[name]
        folder = self._copy(f"whole-{name}", command)
        output = self._output(f"whole-{name}")
        ended = run_child(folder, output, lambda: run(command.argv), 10 * _SECONDS)
        if ended.code != command.code:
            raise RuntimeError(f"{name}: exit code {ended.code}\n{ended.stdout}{ended.stderr}")
        result = command.result(folder, ended.stdout)
        (self.scratch / f"{name.replace(' ', '-')}.result").write_text(json.dumps(result))
        return result

    def trial(self, number: int, *, keep: bool = False) -> dict[str, Any]:
        """Run one trial; what it tells is a function of the seed and the number."""
        rng = random.Random(f"{self.seed}/{number}")
        name = draw(rng)
        command = COMMANDS[name]
        folder = self._copy(f"trial-{number}", command)
        damage = self._damage(folder, command, rng)
        before = snapshot(folder)
        output = self._output(f"trial-{number}")
        # A trial runs in its own process; a damaged path may be `~`.
        home = self._output(f"trial-{number}/home")
        os.environ["HOME"] = str(home)
        ended = run_child(folder, output, lambda: run(command.argv), _SECONDS)
        wanted = json.loads((self.scratch / f"{name.replace(' ', '-')}.result").read_text())
        outcome, detail = judge(
            command,
            damage,
            ended,
            whole=self.whole,
            folder=folder,
            before=before,
            wanted=wanted,
        )
        if keep:
            print(f"{' '.join(command.argv)}  (in {folder})", ended.stdout, ended.stderr, sep="\n")
        else:
            shutil.rmtree(folder.parent)
        return {
            "command": name,
            "target": "config" if damage.key else _family(damage.file),
            "kind": damage.kind,
            "damage": damage.told,
            "outcome": outcome,
            "detail": detail,
        }

    def _damage(self, folder: Path, command: Command, rng: random.Random) -> Damage:
        if command.config and rng.random() < 0.5:
            return damage_config(folder, command.config, rng)
        # Each pattern as often as any other: a folder of many files is one of several inputs.
        patterns = [pattern for pattern in command.reads if any(folder.glob(pattern))]
        pattern = rng.choice(patterns)
        files = sorted(str(p.relative_to(folder)) for p in folder.glob(pattern) if p.is_file())
        return damage_file(folder, rng.choice(files), rng)

    def _copy(self, name: str, command: Command) -> Path:
        """The part of the world that a command needs, with the times of its files."""
        folder = self.scratch / name / "world"
        folder.mkdir(parents=True)
        wanted = {pattern.partition("/")[0] for pattern in command.reads} | set(command.needs)
        if command.config:
            wanted.add(command.config)
        for part in sorted(wanted):
            source = self.whole / part
            if source.is_dir():
                shutil.copytree(source, folder / part, copy_function=shutil.copy2)
            else:
                shutil.copy2(source, folder / part)
        return folder

    def _output(self, name: str) -> Path:
        output = self.scratch / name / "output"
        output.mkdir(parents=True)
        return output


def _family(file: str) -> str:
    """The kind of a file, for the tally."""
    path = Path(file)
    name = path.name
    if path.suffix in (".arrow", ".npy") or name.startswith("tensors-"):
        name = f"*{path.suffix}"
    return f"{path.parts[0]}/{name}" if len(path.parts) > 1 else name
