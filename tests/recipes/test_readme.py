"""The README's programs run and print what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = re.findall(r"```python\n(.*?)```\n\nIt prints\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(3), ids=["pipeline", "sharding", "generation"])
def test_readme_program(tmp_path, number):
    program, printed = PROGRAMS[number]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines, expected = done.stdout.splitlines(), printed.splitlines()
    assert lines[:-1] == expected[:-1]
    words, said = re.split(r"[\d.]+", lines[-1]), re.split(r"[\d.]+", expected[-1])
    assert words == said
    numbers = [[float(number) for number in re.findall(r"[\d.]+", text)] for text in (lines[-1], expected[-1])]
    assert all(abs(ours - theirs) < 0.01 for ours, theirs in zip(*numbers, strict=True))
