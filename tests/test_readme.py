"""The README's Python examples run as they are printed, one after the other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_examples(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "[5, 3, 112, 112]" in capsys.readouterr().out
    assert namespace["states"].shape == (1, 6, 512)


def test_the_readme_starts_with_the_commands_and_links_exist():
    start = (ROOT / "README.md").read_text()[:600]  # a title, what it is, and the first block of commands
    assert start.index("```sh") < start.index("make demo") < start.index("make test")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), target
