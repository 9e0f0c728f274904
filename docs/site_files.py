"""Gives the site the folders of the repository, so that a link in a document leads to the same file on GitHub and on the site.

In: mkdocs' list of the files in docs/. Out: the same files under docs/, and every file of the repository that a page links, and so
on from there. Files that are no Markdown become pages: code as it stands, a notebook with its tables and pictures, a folder as the
list of its files.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
STATIC = {".css", ".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json", "": "text"}
# What a browser would fetch by itself from another machine.
FETCHED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
NOT_FETCHED = re.compile(r"rel=\"?(?:canonical|next|prev)")


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/ by those of the repository that are linked, from the README on."""
    docs = Path(config.docs_dir)
    found = {
        (docs / file.src_uri).relative_to(ROOT).as_posix() for file in files if file.src_dir == str(docs)
    }
    pages = {name for name in found if name.endswith((".md", ".ipynb"))} | {"README.md", *config.extra_css}
    kept = Files([file for file in files if file.src_dir != str(docs)])
    for name in sorted(_linked_from(pages)):
        kept.append(_file(name, config))
    return kept


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links of files that became pages lead to these pages."""
    folder = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: link[1] + link[2] + _ending(_target(folder, link[2])) + link[3], markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Fail where a page would fetch something from another machine."""
    fetched = [tag for tag in FETCHED.findall(output) if not NOT_FETCHED.search(tag)]
    if fetched:
        raise PluginError(f"{page.file.src_uri} would fetch from the network: {fetched[0]}")
    return output


def _linked_from(pages: set[str]) -> set[str]:
    """The names of `pages` and of the files that they link, and these, and so on."""
    found: set[str] = set()
    waiting = set(pages)
    while waiting:
        name = waiting.pop()
        found.add(name)
        if name.endswith(".md"):
            folder = posixpath.dirname(name)
            targets = {_target(folder, link[2]) for link in LINK.finditer((ROOT / name).read_text("utf-8"))}
            waiting |= {target for target in targets if target} - found
    return found


def _target(folder: str, link: str) -> str | None:
    """The file or folder of the repository that a link from `folder` leads to."""
    if ":" in link:
        return None
    name = posixpath.normpath(posixpath.join(folder, link))
    path = ROOT / name
    if path.is_dir() and (path / "README.md").is_file():
        return f"{name}/README.md"
    return name if path.exists() and not name.startswith("..") else None


def _ending(name: str | None) -> str:
    """What a link to a file of the repository lacks to lead to its page."""
    if name is None or Path(name).suffix in STATIC | {".md"}:
        return ""
    return "/README.md" if (ROOT / name).is_dir() else ".md"


def _file(name: str, config: Any) -> File:
    if name.endswith(".md") or Path(name).suffix in STATIC:
        return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    return File.generated(config, name + _ending(name), content=_page(name))


def _page(name: str) -> str:
    """A file that is no Markdown, or a folder, as a page."""
    path = ROOT / name
    if path.is_dir():
        return f"# {name}\n\n" + "\n".join(f"- `{inner.name}`" for inner in sorted(path.iterdir()))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n{_fenced(text, LANGUAGES[path.suffix])}"


def _cell(cell: dict[str, Any]) -> str:
    """A cell of a notebook, with what it printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([_fenced(source, "python"), *(_output(output) for output in cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        return "".join(data["text/html"]).replace("\n\n", "\n")
    return _fenced("".join(data.get("text/plain", output.get("text", ""))), "text")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
