"""The page at /, without a browser: how its files are served, and that they fit each other and the API."""

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
import adadiff
from adadiff.serving.allowed import forms_for
from adadiff.serving.bodies import CompletedDetails, ImageRequest, PreviewDetails
from adadiff.serving.settings import Settings
from adadiff.serving.web_page import FOLDER, KINDS, PAGE, files
from serving.apps import client_of, run, tiny

ROOT = Path(__file__).parents[2]
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
SCRIPT = "\n".join(SCRIPTS.values())


class Page(HTMLParser):
    """Elements as (tag, attributes)."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


HTML = Page(TEXTS[PAGE])


def controls() -> dict[str, str]:
    """From a field of the API to the element that people fill in."""
    (block,) = re.findall(r"^const CONTROLS = \{\n(.*?)^\}", SCRIPTS["form.js"], flags=re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'^  (\w+): "([\w-]+)",$', block, flags=re.MULTILINE))


def test_files_are_served_without_a_key_and_with_a_policy_that_keeps_to_them() -> None:
    async def work() -> None:
        async with client_of(api_keys=("a-key-of-tests",)) as client:
            assert (await client.get("/v1/models")).status_code == 401
            for address in ("/", *(f"/page/{name}" for name in TEXTS)):
                reply = await client.get(address)
                name = address.rpartition("/")[2] or PAGE
                assert (reply.status_code, reply.text) == (200, TEXTS[name])
                assert reply.headers["content-type"] == KINDS[Path(name).suffix]
                policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
                assert policy["default-src"] == "'self'"
                assert not {"script-src", "style-src", "connect-src", "img-src"} & set(policy), "they would widen it"
                assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
                assert reply.headers["x-content-type-options"] == "nosniff"
                assert reply.headers["cache-control"] == "no-cache"
                head = await client.head(address)
                assert head.status_code == 200
                assert {**head.headers, "x-request-id": ""} == {**reply.headers, "x-request-id": ""}
                tag = reply.headers["etag"]
                for known, status in ((tag, 304), (f'"other", W/{tag}', 304), ("*", 304), ('"other"', 200)):
                    again = await client.get(address, headers={"If-None-Match": known})
                    assert (again.status_code, bool(again.content)) == (status, status == 200)

    run(work())


@pytest.mark.parametrize(
    "name", ["none.js", "web_page.py", "..%2fweb_page.py", "%2e%2e/web_page.py", ".", "page.html/x"]
)
def test_nothing_else_is_served(name: str) -> None:
    async def work() -> None:
        async with client_of() as client:
            reply = await client.get(f"/page/{name}")
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "not_found"
            assert (await client.post("/")).status_code == 405

    run(work())


def test_a_visit_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with client_of() as client:
            tag = (await client.get("/page/page.js")).headers["etag"]
            await client.get("/page/page.js", headers={"If-None-Match": tag})
            await client.get("/")
            lines = [record.fields["path"] for record in caplog.records if record.getMessage() == "request"]
            assert [path for path in lines if path != "/ready"] == ["/"]
            assert 'http_requests_total{path="/page/{name}",status="304"} 1.0' in (await client.get("/metrics")).text

    with caplog.at_level("INFO"):
        run(work())


def test_all_files_are_installed_and_small() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert len(TEXTS) > 5
    assert sorted(files()) == sorted(TEXTS)
    assert not [
        name for name in TEXTS if not any(fnmatch(f"serving/page/{name}", pattern) for pattern in tables["adadiff"])
    ]
    assert max(text.count("\n") for text in TEXTS.values()) <= 350
    assert sum(len(text.encode()) for text in TEXTS.values()) < 60_000


def test_elements_that_scripts_name_exist_once() -> None:
    ids = HTML.values("id")
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'byId\("([\w-]+)"\)', SCRIPT))
    named |= set(re.findall(r'"([\w-]+)"', " ".join(re.findall(r"for \(const id of \[(.*?)\]", SCRIPT))))
    named |= {id_ for one in controls().values() for id_ in (one, f"{one}-error")}
    assert len(named) > 30
    assert named <= set(ids)
    referred = {
        id_ for name in ("for", "aria-describedby", "aria-labelledby") for v in HTML.values(name) for id_ in v.split()
    }
    assert referred <= set(ids)


def test_every_control_has_a_label() -> None:
    labelled = set(HTML.values("for"))
    inputs = [found for tag, found in HTML.elements if tag in ("input", "select", "textarea")]
    assert len(inputs) > 8
    assert not [found["id"] for found in inputs if found["id"] not in labelled and "aria-label" not in found]


def test_nothing_is_inline_or_from_elsewhere_and_text_never_becomes_markup() -> None:
    for tag, attributes in HTML.elements:
        assert tag != "style"
        assert tag != "script" or attributes["src"]
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
    addresses = re.findall(r"https?://[^\"'\s]+", "\n".join(TEXTS.values()))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"url\(|@import", TEXTS["page.css"] + TEXTS["pictures.css"])
    makes_markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|javascript:"
    assert not re.findall(makes_markup, SCRIPT)
    assert "localStorage" not in SCRIPT
    assert "document.cookie" not in SCRIPT


def test_files_that_the_page_names_exist() -> None:
    named = {value for name in ("src", "href") for value in HTML.values(name)}
    assert named == {f"page/{name}" for name in ("icon.svg", "page.css", "page.js", "pictures.css")}, "relative"
    for text in SCRIPTS.values():
        for names, file in re.findall(r'^import \{(.*?)\} from "\./([\w.]+)";$', text, flags=re.MULTILINE):
            exported = re.findall(
                r"^export (?:async )?(?:function\*?|class|const) (\w+)", SCRIPTS[file], flags=re.MULTILINE
            )
            assert {name.strip() for name in names.split(",")} <= set(exported)


def test_what_the_page_sends_and_reads_is_what_the_api_has() -> None:
    sent = {*controls(), *re.findall(r'"(stream|partial_images)":', SCRIPTS["form.js"])}
    assert sent == {
        *("model", "prompt", "class_label", "policy", "num_inference_steps", "n", "seed", "guidance_scale"),
        *("stream", "partial_images"),
    }
    assert sent <= set(ImageRequest.model_fields)
    assert set(HTML.values("data-param")) == set(controls())
    served = tiny()
    entry = served.describe(Settings(), [], 0)["adadiff"]
    served.engine.close()
    read = set(re.findall(r"\bentry\.(\w+)", SCRIPT))
    for names in re.findall(r"const \{([^}]*)\} = (?:this|form)\.entry;", SCRIPT):
        read |= {name.split(":")[0].strip() for name in names.split(",")}
    assert {"size", "policies", "max_n", "max_partial_images", "num_layers"} <= read
    assert read <= set(entry)
    details = set(re.findall(r'\badadiff\.(\w+)|(?:mean|most)\("(\w+)"\)', SCRIPTS["sets.js"]))
    known = set(CompletedDetails.model_fields) | set(PreviewDetails.model_fields)
    assert {name for pair in details for name in pair if name} <= known


@pytest.mark.parametrize("name", ["digits", "canvases", "digits_plain"])
def test_policies_that_are_listed_have_words(name: str) -> None:
    """Those without are shown as they are spelled, which presets are meant to be."""
    known = re.findall(r'^  "([\w:=]+)": \[', SCRIPTS["policies.js"], flags=re.MULTILINE)
    shares = re.findall(r"\[/(\^exit:\w+=.*?)/,", SCRIPTS["policies.js"])
    assert len(shares) == 2
    forms = forms_for(adadiff.load(name))
    assert not [form for form in forms if form not in known and not any(re.match(share, form) for share in shares)]
