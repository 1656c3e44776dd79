"""Builds the site: executed notebooks, an API reference and the pages of this folder, as HTML that opens offline.

    python docs/build_site.py --out site

Notebooks run as `make report` runs them, the reference is pdoc's, made from the docstrings. Nothing in the pages asks
another server for anything.
"""

import argparse
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

import markdown2
import pdoc
import pdoc.render

from prescope import __version__
from prescope.core.files import write_text
from prescope.report import execute_notebook

ROOT = Path(__file__).resolve().parent.parent
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"
CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: .25em .8em; border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); text-align: left; }
pre { overflow-x: auto; padding: .8em; border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); }
img { max-width: 100%; }
"""
LINK = re.compile(r'<a href="(?P<target>[^"]*)">(?P<text>.*?)</a>', re.DOTALL)


def build(out: Path, notebooks: Sequence[Path], parameters: dict[str, object] | None = None) -> Path:
    """Build the site; returns its first page.

    Args:
        parameters: of all notebooks, for a quick build.
    """
    build_api(out / "api")
    gallery = [build_notebook(path, out / "notebooks", parameters or {}) for path in notebooks]
    pages = sorted(DOCS.glob("*.md"))
    for page in pages:
        write_text(out / f"{page.stem}.html", as_html(page, pages))
    for image in DOCS.glob("*.png"):
        shutil.copy(image, out / image.name)
    return write_text(out / "index.html", index_page(gallery, pages, out))


def build_api(out: Path, modules: Sequence[str] = ()) -> None:
    """The reference of these modules; of all when none is named. Packages do not name their modules in `__all__`, which
    is what pdoc would go by.
    """
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"prescope {__version__}")
    with warnings.catch_warnings():
        # A package without `__all__` brings its modules along, and they are named once more.
        warnings.filterwarnings("ignore", "The module specification")
        pdoc.pdoc(*(modules or all_modules()), output_directory=out)


def all_modules() -> list[str]:
    """Every module of the package but its command."""
    paths = sorted((ROOT / "prescope").rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def build_notebook(path: Path, out: Path, parameters: dict[str, object]) -> tuple[str, Path]:
    """A notebook's question, and its page."""
    page = execute_notebook(path, out / f"{path.stem}.html", parameters=parameters)
    title = re.search(r'"# ([^"\\]+)', path.read_text("utf-8"))
    return title[1] if title else path.stem, page


def title_of(page: Path) -> str:
    """The first heading of a page."""
    return page.read_text("utf-8").partition("\n")[0].lstrip("# ")


def as_html(page: Path, pages: Sequence[Path]) -> str:
    """A page of Markdown; its links go to pages of the site, or away, or are text where the site has no such page."""
    here = {one.name: f"{one.stem}.html" for one in pages}

    def linked(match: re.Match[str]) -> str:
        path, mark, part = match["target"].partition("#")
        target = here.get(path, path if path == "" or "://" in path else None)
        return match["text"] if target is None else f'<a href="{target}{mark}{part}">{match["text"]}</a>'

    # Without "code-friendly" the underscores of a file's name make its middle slant.
    extras = ["tables", "fenced-code-blocks", "header-ids", "code-friendly"]
    body = markdown2.markdown(page.read_text("utf-8"), extras=extras)
    return framed(title_of(page), LINK.sub(linked, body))


def index_page(gallery: Sequence[tuple[str, Path]], pages: Sequence[Path], out: Path) -> str:
    """The first page: what there is."""

    def listed(items: list[tuple[str, str]]) -> str:
        return "".join(f'<li><a href="{href}">{escape(title)}</a></li>' for title, href in items)

    notebooks = [(title, page.relative_to(out).as_posix()) for title, page in gallery]
    others = [(title_of(page), f"{page.stem}.html") for page in pages]
    body = (
        f"<h1>prescope {__version__}</h1><h2>Notebooks</h2><ul>{listed(notebooks)}</ul>"
        f"<h2>Pages</h2><ul>{listed(others)}</ul><h2>Reference</h2>"
        f'<ul><li><a href="api/prescope.html">All modules, classes and functions</a></li></ul>'
    )
    return framed("prescope", body)


def framed(title: str, body: str) -> str:
    """A whole page."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{CSS}</style></head><body>{body}</body></html>"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    print(build(given.out, sorted(NOTEBOOKS.glob("*.ipynb"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
