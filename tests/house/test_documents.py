"""README and docs: the commands in them are real, the files they name exist, the version is the changelog's."""

import re
import shlex
from pathlib import Path

import pytest

import oarsmith
from oarsmith import cli
from oarsmith.config.load import load_config
from oarsmith.config.registry import config_class

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("src", "tests", "configs", "docs", "examples", "benchmarks", ".ci")
SHELL_OPERATORS = {"|", "&&", ";", ">", ">>", "2>", "&", "||"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def shell_lines(text: str) -> list[str]:
    """The lines of bash, sh and console blocks, continued ones joined, without a leading dollar."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in lines]


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word in SHELL_OPERATORS]
    return words[: ends[0]] if ends else words


def commands_in(path: Path) -> list[list[str]]:
    lines = shell_lines(path.read_text(encoding="utf-8"))
    return [words_of(line) for line in lines if line.startswith("oarsmith ")]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/architecture.md"])
def test_the_document_exists(name):
    assert (ROOT / name).is_file(), f"{name} is missing"


def test_the_readme_shows_commands():
    assert len(commands_in(ROOT / "README.md")) >= 3, "a newcomer needs commands to type"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_commands_are_real(path):
    for words in commands_in(path):
        cli.check(words[1:])
        for word in words[1:]:
            if word.startswith(("configs/", "examples/")):
                assert (ROOT / word).exists(), f"{relative(path)} uses {word}, which does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_make_targets_are_real(path):
    targets = set(re.findall(r"^([\w-]+)\s*:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in shell_lines(path.read_text(encoding="utf-8")):
        if line.startswith("make "):
            assert words_of(line)[1] in targets, f"{relative(path)}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, OURS))})/[\w./-]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    linked = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing += [link for link in linked if link and not (path.parent / link).exists()]
    assert not missing, f"{relative(path)} names what does not exist: {', '.join(missing)}"


def test_shipped_configs_load():
    for path in sorted((ROOT / "configs").rglob("*.[jy]*")):
        load_config(config_class(path.stem.split("_")[0]), path)


def test_version_is_the_changelogs_newest():
    found = re.search(r"^## \[?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert found and found.group(1) == oarsmith.__version__


def test_this_test_can_fail():
    text = "```bash\n$ oarsmith sft a.json \\\n  --lora | tee log # why\nmake test\n```\n"
    lines = shell_lines(text)
    assert words_of(lines[0]) == ["oarsmith", "sft", "a.json", "--lora"]
    assert lines[1] == "make test"
