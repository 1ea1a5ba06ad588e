"""Every command explains itself: a real example that parses, every option described, completion, speed."""

import os
import re
import shlex
import subprocess
import sys

import click
import pytest

from omnidata.cli import cli

COMMANDS = sorted(cli.commands)


def help_of(name):
    command = cli.commands[name]
    return command.get_help(click.Context(command, info_name=name))


def examples_of(name):
    return re.findall(rf"^\s*(omnidata {name} .+)$", help_of(name), flags=re.MULTILINE)


def test_the_commands_of_the_public_interface_are_there():
    assert {"build-shards", "inspect", "verify", "plan", "prepare-tokenizer"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_they_parse(name):
    examples = examples_of(name)
    assert examples, f"omnidata {name} --help shows no example"
    for example in examples:
        words = shlex.split(example.partition("|")[0])[2:]
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert not unknown, example


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name):
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"omnidata {name} {parameter.opts[0]}"


def test_help_and_completion_are_instant_and_load_nothing_heavy():
    code = (
        "import sys\nfrom omnidata.cli import run\nrun(['--help'])\n"
        "heavy = set('numpy pyarrow rich torch transformers tokenizers fsspec yaml'.split())\n"
        "heavy &= sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    start = os.times()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    used = os.times()
    assert result.returncode == 0, result.stderr
    spent = used.children_user + used.children_system - start.children_user - start.children_system
    # time on the CPU, which a busy machine does not stretch; it waits for nothing else
    assert spent < 0.3, f"{spent:.2f} s of processor time"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_and_suggestions(shell):
    def ask(**variables):
        # The console script is how click finds its own name; -m would not do.
        command = [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'omnidata'; from omnidata.cli import main; main()",
        ]
        environment = os.environ | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    if shell != "bash":  # bash's own script asks bash for its version; its suggestions need no shell
        assert "_OMNIDATA_COMPLETE" in ask(_OMNIDATA_COMPLETE=f"{shell}_source")
    if shell == "bash":
        suggestions = ask(_OMNIDATA_COMPLETE="bash_complete", COMP_WORDS="omnidata ver", COMP_CWORD="1")
        assert suggestions.split() == ["plain,verify"]
        suggestions = ask(
            _OMNIDATA_COMPLETE="bash_complete", COMP_WORDS="omnidata inspect --ht", COMP_CWORD="2"
        )
        assert suggestions.split() == ["plain,--html"]
