"""The site builds, and no page of it asks another server for anything."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("pdoc", reason="of the extra docs")
ROOT = Path(__file__).resolve().parents[1]
#: What a browser fetches by itself; a link is followed by a person.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="(?!data:)[a-z]+://|<link[^>]*\shref="https?://|@import url\(["\']?http'
)


@pytest.fixture(scope="module")
def build_site():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_offline(folder: Path) -> None:
    pages = list(folder.rglob("*.html"))
    assert pages
    for page in pages:
        text = re.sub(
            r"<script(?![^>]*\ssrc=)[^>]*>.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL
        )
        assert not FETCHED.search(text), f"{page}: {FETCHED.search(text)}"


def test_the_reference_holds_public_names_with_their_texts(build_site, tmp_path):
    build_site.build_api(tmp_path, ["prescope.errors", "prescope.traces.importers.read"])
    text = (tmp_path / "prescope" / "traces" / "importers" / "read.html").read_text("utf-8")
    assert 'id="read_trace"' in text
    assert "how many" in text
    assert 'id="SlotPoolTooSmall"' in (tmp_path / "prescope" / "errors.html").read_text("utf-8")
    assert_offline(tmp_path)


def test_the_reference_is_of_every_module(build_site):
    names = build_site.all_modules()
    assert {"prescope", "prescope.errors", "prescope.engine.engine", "prescope.cli.app"} <= set(names)
    assert not [name for name in names if "__" in name]


def test_links_of_a_page_lead_to_pages_of_the_site_or_away(build_site, tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    page.write_text(
        "# First\n\n[b](b.md#part), [code](../x/y.py), [out](https://example.org), [a_b_c.md](../a_b_c.md)\n"
    )
    other.write_text("# Second\n")
    text = build_site.as_html(page, [page, other])
    assert '<a href="b.html#part">b</a>' in text
    assert '<a href="https://example.org">out</a>' in text
    assert "y.py" not in text
    assert "a_b_c.md" in text, "the underscores of a file's name are no emphasis"
    assert "code" in text
    assert "<title>First</title>" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_site_builds_and_opens_offline(build_site, tmp_path):
    quick = {"max_new_tokens": 6, "device": "cpu", "out": str(tmp_path / "runs")}
    first = build_site.build(tmp_path / "site", [ROOT / "notebooks" / "00_quickstart.ipynb"], quick)
    text = first.read_text("utf-8")
    for target in re.findall(r'href="([\w/.-]+\.html)"', text):
        assert (first.parent / target).is_file(), target
    assert "notebooks/00_quickstart.html" in text
    assert_offline(tmp_path / "site")
