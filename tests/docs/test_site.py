"""The site of the documents: links that leave docs/ lead to pages, and lists look as they do on GitHub.

`ci/docs` builds it; a link that leads nowhere fails there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from markdown import Markdown

from ci import docs_site


def rewritten(page: str, markdown: str) -> str:
    place: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    nothing: Any = None
    return docs_site.on_page_markdown(markdown, place, nothing, nothing)


@pytest.mark.parametrize(
    ("page", "link", "to"),
    [
        ("index.md", "docs/api.md#keys", "api.md#keys"),
        ("index.md", "docs/decisions", "decisions/index.md"),
        ("index.md", "CHANGELOG.md", "CHANGELOG.md"),
        ("index.md", "examples/agent.py", "sources/examples/agent.py.md"),
        ("CHANGELOG.md", "docs/api.md", "api.md"),
        ("concepts.md", "../README.md#a-task-or-a-workflow", "index.md#a-task-or-a-workflow"),
        ("concepts.md", "decisions/hold.md", "decisions/hold.md"),
        ("concepts.md", "../examples/shop_django", "sources/examples/shop_django.md"),
        ("decisions/hold.md", "../concepts.md", "../concepts.md"),
        ("decisions/hold.md", "../../examples/agent.py", "../sources/examples/agent.py.md"),
        ("concepts.md", "#keys", "#keys"),
        ("concepts.md", "https://peps.python.org/", "https://peps.python.org/"),
    ],
)
def test_links_lead_to_pages(page: str, link: str, to: str) -> None:
    assert rewritten(page, f"see [this]({link}) here") == f"see [this]({to}) here"


def test_links_in_code_stay() -> None:
    text = "`[a](../README.md)`\n\n```text\n[a](../README.md)\n```\n"
    assert rewritten("concepts.md", text) == text.replace("```\n", "```\n\n", 2).replace("text\n\n", "text\n")


NESTED = """\
- one, which
  goes on
  - a
  - b, which
    goes on

  more of one

  ```text
  code
  ```
- two
"""


def test_what_is_inside_of_an_item_stays_there() -> None:
    reader = Markdown(extensions=["pymdownx.superfences"])
    html = reader.convert(docs_site.normalize(NESTED))
    assert html.count("<ul>") == 2
    assert html.count("<li>") == 4
    first, _, second = html.rpartition("<li>")
    assert all(text in first for text in ("more of one", "<code>code", "</ul>"))
    assert "two" in second


def test_each_public_name_is_in_the_reference() -> None:
    import pgtask

    page = docs_site.docstrings_page("pgtask", "Names")
    named = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert named == set(pgtask.__all__)
    assert "::: pgtask.task_function.task" in page
    assert "## Make functions durable" in page
