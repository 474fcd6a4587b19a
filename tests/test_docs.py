"""The pages of the documentation hang together, and their code is Python; the build itself is ``make docs``."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "generated" not in path.parts)


def names(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, without their options."""
    blocks = re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(r"^:[\w-]+:.*\n", "", block, flags=re.M) for block in blocks]


def entries(page: Path) -> list[str]:
    """The pages that the tables of contents of a page name, from the root of the documentation."""
    found = "\n".join(fenced(page, r"\{toctree\}")).split("\n")
    return [(page.parent / line).relative_to(DOCS).as_posix() for line in found if line]


LISTED = [entry for page in PAGES for entry in entries(page)]


def test_every_entry_of_a_table_of_contents_is_a_page():
    assert LISTED
    assert sorted(set(LISTED) - set(map(names, PAGES))) == []
    assert len(LISTED) == len(set(LISTED))


def test_every_page_is_in_a_table_of_contents():
    assert sorted(set(map(names, PAGES)) - {"index"} - set(LISTED)) == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_code_is_python(page: Path):
    for code in [*fenced(page, "python"), *fenced(page, r"\{code-cell\}")]:
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_between_files_lead_to_files(page: Path):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).resolve().exists(), link
