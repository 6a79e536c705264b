"""Help pages: complete, true about defaults, and readable on a narrow terminal."""

import argparse
import dataclasses
import re
import shlex
from importlib import resources

import pytest
from safetensors import safe_open

from adadiff import cli
from adadiff.commands import options, pages, texts
from adadiff.commands.formatting import HelpFormatter
from adadiff.diffusion.solvers import SOLVERS
from adadiff.policies.spelling import POLICIES, parts_from
from adadiff.training.config import TrainConfig
from adadiff.training.losses import LOSSES

COMMANDS = {
    name: parser
    for action in cli.parser()._actions
    if isinstance(action, argparse._SubParsersAction)
    for name, parser in action.choices.items()
}
each_command = pytest.mark.parametrize("command", COMMANDS)


def test_every_command_has_a_page() -> None:
    assert list(COMMANDS) == list(pages.PAGES)


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("line", ["", *pages.PAGES])
def test_pages_fit_the_terminal(
    line: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        cli.main([*line.split(), "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert printed.startswith(f"usage: adadiff {line}")
    assert max(map(len, printed.splitlines())) <= columns
    if line:
        assert pages.EXAMPLES[line] in printed, "examples are not wrapped"


def test_the_list_of_commands_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page, width = cli.parser().format_help(), max(map(len, pages.PAGES))
    for name in pages.PAGES:
        assert re.search(rf"^    {name:{width}}  {re.escape(pages.PAGES[name].summary)}$", page, re.MULTILINE)


@each_command
def test_usage_names_what_is_required(command: str) -> None:
    """Positional arguments come first: after --prompt or --other they would be taken for one more value."""
    usage = COMMANDS[command].format_usage()
    required = [a for a in COMMANDS[command]._actions if a.required]
    words = [a.metavar if not a.option_strings else a.option_strings[0] for a in required]
    places = [usage.find(f" {word}") for word in sorted(words, key=lambda word: word.startswith("-"))]
    assert -1 not in places
    assert places == sorted(places)
    assert ("[options]" in usage) == (len(COMMANDS[command]._actions) > 1)


@each_command
def test_long_pages_have_headings(command: str) -> None:
    titles = [group.title for group in COMMANDS[command]._action_groups if group._group_actions]
    assert len(COMMANDS[command]._actions) <= 10 or len(titles) >= 5
    assert len(set(titles)) == len(titles)


@each_command
def test_every_option_is_explained_and_names_its_default(command: str) -> None:
    for action in COMMANDS[command]._actions:
        assert re.match(r"[a-z]", action.help), f"{action.dest}: texts begin in lower case"
        assert not action.help.endswith("."), action.dest
        is_flag = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        assert ("(default: " in action.help) == (not action.required and not is_flag), action.dest
        assert action.help.endswith("(required)") == (action.required and bool(action.option_strings)), action.dest
        assert max(map(len, action.help.split())) <= 34, f"{action.dest}: a word is broken on a terminal of 60 columns"


@each_command
def test_defaults_are_those_of_the_parser(command: str) -> None:
    for action in COMMANDS[command]._actions:
        if not (action.required or action.default in (None, argparse.SUPPRESS) or action.nargs == 0):
            shown = re.search(r"\(default: ((?:[^,)]|,(?! ))+)", action.help).group(1)  # 2,3,5 or 7, with a reason
            assert (action.type or str)(shown) == action.default, action.dest


def test_defaults_of_a_training_are_those_of_its_configuration() -> None:
    help_of = {
        action.dest: action.help for action in COMMANDS["train"]._actions if action.option_strings[-1:] != ["--plain"]
    }
    for field in dataclasses.fields(TrainConfig):
        shown = re.search(r"\(default: ([^)]+)\)$", help_of[field.name]).group(1)
        if field.type is bool:
            assert shown == f"--{'' if field.default else 'no-'}{field.name}"
        elif field.type in (dict, list) or field.default == "":
            assert shown == "none"
        else:
            assert field.type(shown) == field.default


def test_every_training_setting_stands_under_one_heading() -> None:
    explained = [name for group in texts.TRAIN_GROUPS.values() for name in group]
    assert sorted(explained) == sorted(field.name for field in dataclasses.fields(TrainConfig))


def examples(text: str) -> list[list[str]]:
    """Arguments of every call of adadiff in it, launchers left out."""
    calls = re.findall(r"^  (?:\S.* -m )?adadiff (.*)$", text.replace("\\\n", ""), re.MULTILINE)
    return [shlex.split(call) for call in calls]


@each_command
def test_every_example_parses(command: str) -> None:
    page = pages.PAGES[command].examples
    calls = examples(page)
    assert len(calls) == len(re.findall(r"^  [^ #]", page, re.MULTILINE)) > 0
    for call in calls:
        assert call[0] == command
        cli.parser().parse_args(call)


def test_first_steps_parse() -> None:
    calls = examples(pages.START)
    assert len(calls) >= 3
    for call in calls:
        cli.parser().parse_args(call)


@each_command
def test_prose_names_options_that_exist(command: str) -> None:
    page = pages.PAGES[command]
    own = {option for action in COMMANDS[command]._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]*", page.description + page.notes))
    assert named <= own | {"--policy", "--steps"}, "these may be those of `adadiff sample`"


def test_the_list_of_policies_is_complete() -> None:
    listed = re.findall(r"^  (\S+)", texts.POLICY_TABLE, re.MULTILINE)
    kinds = {f"{e.name}:{e.spelled}" for e in POLICIES.entries if e.spelled and not (e.bare or e.path)}
    others = {"full", "exit:U", "exit:U,min_layer", "width:W", "width:FILE", "cascade:FILE", "estimate:FILE"}
    assert {form.partition("=")[0] for form in listed} == others | kinds
    for form in listed:
        if "SHARE" not in form and "FILE" not in form:
            parts_from(form.replace("U", "0.1").replace("C", "0.1").replace("K", "2").replace("W", "0.5"))


def test_solvers_and_losses_are_all_named() -> None:
    assert all(
        f"{name}," in texts.SOLVER_HELP or f"{name} " in texts.SOLVER_HELP or f"{name}:" in texts.SOLVER_HELP
        for name in SOLVERS.names
    )
    assert all(name in texts.TRAIN_GROUPS["loss"]["loss"] for name in LOSSES)


def test_models_of_the_package_are_all_named() -> None:
    folder = resources.files("adadiff").joinpath("checkpoints")
    shipped = set()
    for file in folder.iterdir():
        if file.name.endswith(".safetensors"):
            with safe_open(str(file), framework="pt") as opened:
                if "config" in opened.metadata():
                    shipped.add(file.name.removesuffix(".safetensors"))
    assert set(re.split(r", | or ", options.MODELS)) == shipped


def test_indented_lines_are_kept_and_prose_is_wrapped() -> None:
    prose = "a --long-option stays whole " * 3
    parser = argparse.ArgumentParser(
        prog="p", formatter_class=lambda prog: HelpFormatter(prog, width=30), epilog=f"{prose}\n  kept {'x' * 40}"
    )
    parser.add_argument("--x", help="a well-known name-of-a-thing that-is-hyphenated")
    lines = parser.format_help().splitlines()
    assert f"  kept {'x' * 40}" in lines
    assert all(len(line) <= 30 for line in lines if not line.startswith("  kept"))
    assert not [line for line in lines if line.endswith("-")]
