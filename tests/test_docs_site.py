"""The site: its navigation lists every page, the links of all pages lead somewhere, and the files around the project agree with it."""

import re
from pathlib import Path

import pytest
import yaml

import microcinema

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags (`!!python/name`) only mkdocs can resolve."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def site() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def nav_pages(node) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [page for child in (node.values() if isinstance(node, dict) else node) for page in nav_pages(child)]


def text_of(page: Path) -> str:
    """A page without its code blocks, with the files that it includes."""
    text = SNIPPET.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), page.read_text(encoding="utf-8"))
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by the rule of GitHub and of Python-Markdown for headings of plain words."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def test_the_navigation_lists_every_page_once():
    assert sorted(nav_pages(site()["nav"])) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_and_anchors_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page)) + re.findall(r'(?:src|href)="([^"]+)"', text_of(page))
    broken = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        # The site holds the files of docs/ alone; README and CONTRIBUTING may lead anywhere in the repository.
        outside = DOCS in page.parents and DOCS not in target.resolve().parents
        if outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_reference_has_a_page_for_every_package():
    packages = {path.parent.name for path in (ROOT / "microcinema").glob("*/__init__.py")}
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}
    assert packages == set(pages) - {"index"}
    assert all(f"::: microcinema.{name}\n" in pages[name] for name in packages)


def test_the_site_loads_nothing_from_elsewhere():
    config = site()
    assert config["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(config)


def test_make_docs_installs_what_the_extra_names():
    extra = re.search(r"^docs = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    names = re.findall(r'"([\w-]+(?:\[\w+\])?)>=', extra[1])
    assert names and all(name in (ROOT / "Makefile").read_text(encoding="utf-8") for name in names)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(any(pin.startswith(f"{name.partition('[')[0]}==") for pin in pins) for name in names)


def test_citation_changelog_and_typing():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == microcinema.__version__
    assert {r["identifiers"][0]["value"] for r in citation["references"]} == {"arXiv:2311.18829", "arXiv:2408.10119"}
    assert f"## [{microcinema.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / "microcinema" / "py.typed").is_file()


def test_model_cards_cite_what_the_readme_cites():
    entries = re.compile(r"^```bibtex$(.*?)^```$", re.MULTILINE | re.DOTALL)
    texts = [ROOT / "README.md", ROOT / "microcinema/commands/templates/model_card.md.jinja"]
    readme, card = (entries.search(path.read_text(encoding="utf-8"))[1] for path in texts)
    assert readme == card and "Proceedings of the IEEE/CVF" in readme
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"][0]
    names = [f"{author['family-names']}, {author['given-names']}" for author in citation["authors"]]
    assert " and ".join(names) in re.sub(r"\s+", " ", readme)


def test_continuous_integration_runs_what_ci_run_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps and "make docs" in steps
    targets = workflow["jobs"]["versions"]["strategy"]["matrix"]["target"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["test-lowest", "release-check"] and all(f"\n{target}:" in makefile for target in targets)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
