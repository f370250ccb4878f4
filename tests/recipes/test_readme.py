"""The programs in the README and in docs/ run and print what the pages say.

A page is run as one script, block by block, so that later blocks may use the names of earlier ones. The pages under
docs/ run after each other in one process on one cluster, which `tw.init` joins: starting one takes most of the time.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = {
    "readme": ["README.md"],
    "docs": [
        "docs/programs.md",
        "docs/sharding.md",
        "docs/pipelines.md",
        "docs/replicas.md",
        "docs/operations.md",
        "docs/data.md",
        "docs/checkpoints.md",
        "docs/faq.md",
    ],
    "generation": ["docs/generation.md"],
}
CLUSTER = ["-m", "torchways.run", "--islands", "2", "--devices-per-island", "4"]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\nIt prints\n\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
END = "---- end of a block ----"
RUN = "import runpy, sys\nfor page in sys.argv[1:]:\n    runpy.run_path(page, run_name='__main__')\n"


def blocks(page):
    """Returns the Python blocks of a page, each with what it prints."""
    return BLOCK.findall((ROOT / page).read_text())


def test_every_page_with_programs_is_in_a_group():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert sorted(page for page in pages if blocks(page)) == sorted(itertools.chain(*GROUPS.values()))


@pytest.mark.parametrize("pages", GROUPS.values(), ids=GROUPS)
def test_programs_print_what_the_page_says(tmp_path, pages):
    for number, page in enumerate(pages):
        script = "\n".join(f"{program}\nprint({END!r}, flush=True)" for program, _ in blocks(page))
        (tmp_path / f"page{number}.py").write_text(script)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, *(CLUSTER if len(pages) > 1 else []), "run.py"]
    done = subprocess.run(
        [*command, *(f"page{number}.py" for number in range(len(pages)))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [(page, program, printed) for page in pages for program, printed in blocks(page)]
    found = done.stdout.split(END + "\n")[:-1]
    for (page, program, printed), output in zip(expected, found, strict=True):
        assert agrees(output, printed), f"{page}: the block\n{program}\nprints\n{output}"


def agrees(output, printed):
    """Whether two texts are the same but for numbers that differ by less than 0.01."""
    if re.split(r"\d+(?:\.\d+)?", output) != re.split(r"\d+(?:\.\d+)?", printed):
        return False
    numbers = [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)] for text in (output, printed)]
    return all(abs(ours - theirs) < 0.01 for ours, theirs in zip(*numbers, strict=True))
