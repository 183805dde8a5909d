"""Pages of the documentation site that are no file in docs/: a hook of MkDocs, see mkdocs.yml.

The first page is README.md. A file or folder of the repository that a document links to gets a page with its text. The
reference from the docstrings has a page for each public module. Links that leave docs/ lead to these pages; on GitHub
they lead to the files.
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
MODULES = {
    "pgtask": "Tasks, workflows and clients",
    "pgtask.errors": "Errors",
    "pgtask.testing": "Tools for tests",
    "pgtask.pytest_plugin": "Fixtures of pytest",
    "pgtask.django": "Django",
    "pgtask.fastapi": "FastAPI",
}
LINK = re.compile(r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)|(?<=\]\()(?P<target>[^)\s]+)", re.MULTILINE | re.DOTALL)
CODE_OR_ITEM = re.compile(
    r"(?P<code>^ *```.*?^ *```)|(?P<before>^\n)^ {2,3}(?!```|\s)|^ {2,3}(?=[-*] |\d+\. )", re.MULTILINE | re.DOTALL
)
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".service": "ini", "Dockerfile": "dockerfile"}
MAX_BYTES = 20_000  # of a file that is shown; of a longer one, only the size


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the folders in the navigation by their pages."""
    folders = {
        "docstrings/": [f"docstrings/{module}.md" for module in MODULES],
        "decisions/": ["decisions/index.md", *(f"decisions/{path.name}" for path in find_decisions())],
        "sources/": [site_path(path) for path in find_sources()],
    }
    config.nav = expand(config.nav, folders)
    return config


def expand(entry: Any, folders: dict[str, list[str]]) -> Any:
    if isinstance(entry, list):
        return [expand(item, folders) for item in entry]
    if isinstance(entry, dict):
        return {title: expand(item, folders) for title, item in entry.items()}
    return folders.get(entry, entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file in docs/."""
    pages = {to: (ROOT / name).read_text() for name, to in DOCUMENTS.items()}
    pages |= {f"docstrings/{module}.md": docstrings_page(module, title) for module, title in MODULES.items()}
    pages |= {site_path(path): source_page(path) for path in find_sources()}
    pages["decisions/index.md"] = decisions_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a document to pages of the site."""
    here = repository_path(page.file.src_uri)
    if here is None:
        return markdown
    place = posixpath.dirname(page.file.src_uri)

    def rewrite(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or "://" in target or target.startswith("#"):
            return found[0]
        file, mark, anchor = target.partition("#")
        to = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(here), file)))
        return posixpath.relpath(to, place or ".") + mark + anchor

    return LINK.sub(rewrite, normalize(markdown))


def normalize(markdown: str) -> str:
    """Write Markdown so that Python-Markdown reads it as GitHub does: what is inside of an item of a list is indented
    by four spaces, and an empty line follows a block of code."""

    def rewrite(found: re.Match[str]) -> str:
        if code := found["code"]:
            return textwrap.indent(code, " " * (-(len(code) - len(code.lstrip(" "))) % 4)) + "\n"
        return f"{found['before'] or ''}    "

    return CODE_OR_ITEM.sub(rewrite, markdown)


def repository_path(name: str) -> str | None:
    """Return the file in the repository of a page of the site, if the page is one."""
    if name.startswith(("docstrings/", "sources/")) or name == "decisions/index.md":
        return None
    return next((file for file, to in DOCUMENTS.items() if to == name), f"docs/{name}")


def site_path(path: str) -> str:
    """Return the page of the site for a file or folder of the repository."""
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
        return path if (ROOT / "docs" / path).is_file() else f"{path}/index.md"
    return DOCUMENTS.get(path) or f"sources/{path}.md"


def find_decisions() -> list[Path]:
    return sorted((ROOT / "docs/decisions").glob("*.md"))


def decisions_page() -> str:
    """Return the list of the decisions."""
    titles = [re.findall("^# (.*)", path.read_text())[0] for path in find_decisions()]
    lines = [f"- [{title}]({path.name})" for title, path in zip(titles, find_decisions(), strict=True)]
    return "# Decisions\n\nWhy things are as they are.\n\n" + "\n".join(lines) + "\n"


def find_sources() -> list[str]:
    """List the files and folders outside of docs/ that the documents link to."""
    found = set()
    for document in [*(ROOT / name for name in DOCUMENTS), *ROOT.glob("docs/**/*.md")]:
        for link in LINK.finditer(document.read_text()):
            target = (link["target"] or "").partition("#")[0]
            path = os.path.normpath(document.parent / target)
            if target and "://" not in target and not path.startswith(f"{ROOT}/docs/") and Path(path).exists():
                found.add(Path(path).relative_to(ROOT).as_posix())
    return sorted(found - set(DOCUMENTS))


def source_page(path: str) -> str:
    """Return the page that shows a file, or the files of a folder."""
    files = [ROOT / path]
    if (ROOT / path).is_dir():
        files = sorted(one for one in (ROOT / path).rglob("*") if one.is_file() and "__pycache__" not in one.parts)
    parts = [f"# {path}\n"]
    for file in files:
        parts += [f"## {file.name}\n"] if file != ROOT / path else []
        parts += notebook(file) if file.suffix == ".ipynb" else [listing(file)]
    return "\n".join(parts)


def listing(file: Path) -> str:
    if file.stat().st_size > MAX_BYTES:
        return f"{file.stat().st_size:,} bytes: see `{file.relative_to(ROOT)}` in the repository.\n"
    return f"````{LANGUAGES.get(file.suffix or file.name, '')}\n{file.read_text().rstrip()}\n````\n"


def notebook(file: Path) -> Iterator[str]:
    """Yield the cells of a notebook, without the title, which the page has."""
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        yield f"```python\n{text}\n```\n" if cell["cell_type"] == "code" else re.sub("(?m)^# ", "## ", text) + "\n"


def docstrings_page(module: str, title: str) -> str:
    """Return the page of a module, with what is in its `__all__`, in the groups of the comments there."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    text = (path if path.exists() else path.with_suffix("") / "__init__.py").read_text()
    lines = re.findall(r"^__all__ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[0]
    parts = [f"# {title}\n", f"Import these names from `{module}`.\n"]
    tree = ast.parse(text)
    imports = [one for one in tree.body if isinstance(one, ast.ImportFrom)]
    homes = {name.name: f"{one.module}.{name.name}" for one in imports for name in one.names}
    for comment, name in re.findall(r'# (.*)|"(\w+)"', lines):
        is_module = (ROOT / module.replace(".", "/") / f"{name}.py").exists()  # pgtask.task is also a module
        where = homes[name] if is_module else f"{module}.{name}"
        parts.append(f"::: {where}\n" if name else f"## {comment[0].upper()}{comment[1:]}\n")
    parts.insert(1, (ast.get_docstring(tree) or "").partition("\n\n")[0] + "\n")
    return "\n".join(parts)
