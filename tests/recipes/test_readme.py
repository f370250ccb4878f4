"""The README's program runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_program(tmp_path):
    text = (ROOT / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    printed = re.search(r"It prints\n\n```\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines, expected = done.stdout.splitlines(), printed.splitlines()
    assert lines[0] == expected[0]
    numbers = [[float(number) for number in re.findall(r"[\d.]+", text)] for text in (lines[1], expected[1])]
    assert all(abs(ours - said) < 0.01 for ours, said in zip(*numbers, strict=True))
