"""What the page of the service says is so: fields, codes, metrics, options and examples."""

import argparse
import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from adadiff import cli
from adadiff.commands.serve import settings_of
from adadiff.serving import allowed, app, bodies, drawing, errors, gate, orders, pictures, reading, service
from adadiff.serving.metrics import Metrics
from adadiff.serving.settings import Settings
from serving.apps import client_of, run, tiny

PAGE = (Path(app.__file__).parent / "README.md").read_text()
SOURCES = "\n".join(
    Path(module.__file__).read_text()
    for module in (allowed, app, bodies, drawing, errors, gate, orders, pictures, reading, service)
)


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_field_is_explained() -> None:
    assert re.findall(r"^\| `(\w+)` \|", section("Requests"), flags=re.MULTILINE) == list(
        bodies.ImageRequest.model_fields
    )


def codes() -> set[str]:
    """Those that sources write out where an error is made."""
    found = {"invalid_value"}  # the default of `invalid`
    for call in (node for node in ast.walk(ast.parse(SOURCES)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in ("ServiceError", "invalid"):
            given = [*call.args[2:3], *(one.value for one in call.keywords if one.arg == "code")]
            found |= {one.value for one in given if isinstance(one, ast.Constant)}
    return found


def test_every_code_is_listed() -> None:
    rows = re.findall(r"^\| [\d, ]+ \| (.*?) \|", section("Replies"), flags=re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert len(codes()) > 15
    assert codes() <= listed
    assert not {code for code in listed if f'"{code}"' not in SOURCES}


def test_every_metric_is_named() -> None:
    page = Metrics({"tiny": tiny()}).page().decode()
    real = set(re.findall(r"^# TYPE adadiff_(\w+) (?:counter|gauge|histogram)", page, flags=re.MULTILINE))
    real = {name for name in real if not name.endswith("_created")}
    named = set(re.findall(r"`([a-z0-9_]+)`", section("Models, health, metrics").partition("Metrics begin")[2]))
    assert named - {"adadiff_", "client_gone", "head_too_slow", "head_too_long"} == real


def test_limits_are_those_of_the_settings_and_options() -> None:
    options = cli.parser().parse_args(["serve", "digits"])
    for option, value in re.findall(r"^\| `--([a-z-]+)` \| (\d+)", section("Limits and access"), flags=re.MULTILINE):
        assert getattr(options, option.replace("-", "_")) == int(value), option
    assert settings_of(options, {}) == Settings()


def test_commands_of_the_page_parse() -> None:
    calls = [line for text in blocks("bash") for line in text.splitlines() if line.startswith("adadiff ")]
    assert len(calls) == 2
    for call in calls:
        cli.parser().parse_args(shlex.split(call)[1:])


def test_the_body_of_the_page_is_drawn_and_its_python_runs() -> None:
    body, stream = re.findall(r"-d '(\{.*?\})'", PAGE)
    namespace: dict[str, object] = {}
    (application,) = (block for block in blocks("python") if "create_app" in block)
    exec(application, namespace)
    made = namespace["app"]

    async def work() -> None:
        models = list(made.state.service.models.values())
        async with client_of(*models) as client:
            reply = await client.post(app.GENERATIONS, json=json.loads(body))
            assert reply.status_code == 200
            assert reply.json()["adadiff"]["share_left_out"] > 0
            reply = await client.post(app.GENERATIONS, json=json.loads(stream))
            kinds = re.findall(r"^event: (.*)$", reply.text, flags=re.MULTILINE)
            assert set(kinds) <= {"image_generation.partial_image", "image_generation.completed"}
            assert kinds[-1] == "image_generation.completed"

    run(work())


@pytest.mark.parametrize(
    "name", ["--api-key-file", "--batch-invariant", "--policy", "--host", "--port", "--log-format"]
)
def test_options_named_are_options(name: str) -> None:
    assert name in PAGE
    assert name in cli.parser().format_help() or name in _help()


def _help() -> str:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices["serve"].format_help()
