"""Hooks of MkDocs: some pages are files that lie elsewhere in the repository, and links work in both places.

A link in Markdown is a path within the repository, so that it works wherever the file itself is read. On the site it
leads to the page made of that file, or to a copy of the file under `files/`. No text has to be written twice.
"""

import os.path
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ("README", "equal-seconds", "digits", "network", "serving", "http", "diffusers", "recipes", "uncertainty")
RESULTS += ("depth", "head-to-head", "parity", "solver-parity", "resources", "gpu")
CARDS = ("README", "digits", "canvases", "digits_prototypes", "letters")
ELSEWHERE = {  # page of the site: the file it is made of
    "guides/policies.md": "python/adadiff/policies/README.md",
    "guides/diffusers.md": "python/adadiff/pipelines/README.md",
    "guides/serving.md": "python/adadiff/serving/README.md",
    "guides/examples.md": "examples/README.md",
    **{f"benchmarks/{name}.md".replace("README", "index"): f"benchmarks/results/{name}.md" for name in RESULTS},
    **{f"models/{name}.md".replace("README", "index"): f"python/adadiff/checkpoints/{name}.md" for name in CARDS},
    "project/changelog.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/security.md": "SECURITY.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
CODE = re.compile(r"(^```.*?^```$|`(?:[^`\n]|\n(?!\n))*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADDRESS = re.compile(r"[a-z]+:|#")


def source_of(page: str) -> str:
    """page: path below docs/. Returns the path in the repository of the file that it is made of."""
    return ELSEWHERE.get(page, f"docs/{page}")


def place_of(source: str) -> str:
    """Where a file of the repository lies on the site."""
    if source in PAGE_OF:
        return PAGE_OF[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"files/{source}"


def targets(text: str, source: str) -> list[str]:
    """Files of the repository that the Markdown text of the file `source` links to, pictures included."""
    found = [target for part in CODE.split(text)[::2] for target in LINK.findall(part)]
    return [_resolved(target, source) for target in found if not ADDRESS.match(target)]


def rewritten(text: str, source: str) -> str:
    """The text of the file `source`, with links as they are on the site. ValueError for a link to no file."""
    here = posixpath.dirname(place_of(source))

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if ADDRESS.match(target):
            return match[0]
        file, (_, hash_, anchor) = _resolved(target, source), target.partition("#")
        if not (ROOT / file).is_file():
            raise ValueError(f"{source} links to {target}, which is no file of the repository")
        return f"]({posixpath.relpath(place_of(file), here)}{hash_}{anchor})"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def _resolved(target: str, source: str) -> str:
    return os.path.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie elsewhere, and copies of the files that pages link to."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        source = source_of(page.src_uri)
        for file in targets((ROOT / source).read_text(), source):
            place = place_of(file)
            if files.get_file_from_path(place) is None and (ROOT / file).is_file():
                files.append(File.generated(config, place, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return rewritten(markdown, source_of(page.file.src_uri))
