"""The documents: every relative link leads to a file, and every anchor to a heading."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.ipynb"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    folders = (ROOT / "LLaVA", ROOT / ".github", ROOT / "lmms_eval")  # not a git checkout
    return [
        ROOT / "README.md",
        *(path for folder in folders for kind in ("md", "ipynb") for path in folder.rglob(f"*.{kind}")),
    ]


def prose(path: Path) -> str:
    """A document's Markdown, without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return CODE.sub("", text)


def anchors(path: Path) -> set[str]:
    """The headings of a document as GitHub names them, and what it names itself."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    names = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path):
    broken = []
    for address in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", address):
            continue
        name, _, anchor = address.partition("#")
        target = path if not name else path.parent / name
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(address)
    assert broken == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` [c](page.md)!\n## Twice\n## Twice\n`[not](a-link)` [away](https://x.y#z) "
        "[x](page.md#a-b-c) [y](#twice-1)"
    )
    assert anchors(page) == {"a-b-c", "twice", "twice-1"}
    test_every_relative_link_leads_somewhere(page)
    page.write_text("[x](#nowhere)")
    with pytest.raises(AssertionError, match="#nowhere"):
        test_every_relative_link_leads_somewhere(page)


def test_the_version_is_the_same_everywhere():
    import llava

    places = {
        "LLaVA/pyproject.toml": r'^version = "(.+)"',
        "lmms_eval/pyproject.toml": r'^version = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "LLaVA/docs/CHANGELOG.md": r"^## (\S+)",
    }
    found = {name: re.search(line, (ROOT / name).read_text(), re.MULTILINE)[1] for name, line in places.items()}
    assert set(found.values()) == {llava.__version__}, found
