"""Flags and TOML from the dataclasses."""

import dataclasses
import importlib
import tomllib
import typing
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.cli import toml
from optiq.cli.main import VERBS, run
from optiq.cli.options import SECTIONS, Configs, config_options, flag_name
from optiq.configs import AllocateConfig, MeasureConfig, RunConfig, words_of
from optiq.errors import UsageError


def parse(*words, types=(RunConfig, MeasureConfig, AllocateConfig)):
    """The dataclasses that a command line gives."""

    @click.command()
    @config_options(*types)
    def command(configs):
        return configs

    return command.main(list(words), standalone_mode=False)


def test_defaults_are_those_of_the_dataclasses():
    configs = parse()
    assert configs[MeasureConfig] == MeasureConfig()
    assert configs[AllocateConfig] == AllocateConfig()
    assert configs[RunConfig] == RunConfig()


def test_a_type_without_flags_has_its_defaults():
    assert Configs({})[MeasureConfig] == MeasureConfig()


def test_flags_have_the_types_of_the_fields():
    configs = parse(
        *("--work", "w", "--offline", "--seed", "3", "--effort", "quick"),
        *("--target-bpw", "4.5", "--pin", "a=4/64", "--pin", "b=bf16"),
    )
    assert configs[RunConfig] == RunConfig(work=Path("w"), offline=True)
    assert configs[MeasureConfig] == MeasureConfig(seed=3, effort="quick")
    assert configs[AllocateConfig] == AllocateConfig(target_bpw=4.5, pin=("a=4/64", "b=bf16"))


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "o.toml"
    file.write_text('[measure]\nseed = 5\neffort = "quick"\n[allocate]\ntarget_bpw = 4\n')
    configs = parse("--config", str(file), "--seed", "0")
    assert configs[MeasureConfig] == MeasureConfig(seed=0, effort="quick")
    assert configs[AllocateConfig] == AllocateConfig(target_bpw=4.0)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[measur]\n", "section 'measur' is unknown; did you mean 'measure'"),
        ("[measure]\nsed = 1\n", "[measure]: key 'sed' is unknown; did you mean 'seed'"),
        ("[measure]\nseed = '1'\n", "seed must be a whole number, not '1'"),
        ("[measure]\nseed = true\n", "seed must be a whole number, not True"),
        ("[measure]\neffort = 'huge'\n", "effort must be one of quick, standard, thorough"),
        ("[run]\noffline = 1\n", "offline must be true or false, not 1"),
        ("[run]\nwork = 1\n", "work must be a string with a path, not 1"),
        ("[run]\nmemory_limit = 8\n", "memory_limit must be a string, not 8"),
        ("[allocate]\npin = 'a=4/64'\n", "pin must be a list of strings"),
        ("[allocate]\ntarget_bpw = '4'\n", "target_bpw must be a number, not '4'"),
        ("measure = 1\n", "must be a section with keys, not 1"),
        ("[measure\n", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_names_the_key(text, part, tmp_path):
    file = tmp_path / "o.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        toml.read(file, SECTIONS)
    assert part in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_of_other_verbs_is_fine(tmp_path):
    file = tmp_path / "o.toml"
    file.write_text("[judge]\nwindow = 64\n")
    assert parse("--config", str(file))[MeasureConfig] == MeasureConfig()


def test_the_example_is_valid_with_and_without_comment_signs(capsys, tmp_path):
    assert run(["config"]) == 0
    text = capsys.readouterr().out
    assert all(not table for table in tomllib.loads(text).values())
    live = [
        line.removeprefix("# ") if " = " in line and line[2:].split(" ")[0].isidentifier() else line
        for line in text.splitlines()
    ]
    file = tmp_path / "o.toml"
    file.write_text("\n".join(live).replace('"value"', '"8GB"'))
    read = toml.read(file, SECTIONS)
    for config_type in SECTIONS.values():
        assert set(read[config_type]) == {f.name for f in dataclasses.fields(config_type)}


@pytest.mark.parametrize("verb", VERBS)
def test_no_command_has_a_flag_twice(verb):
    command = importlib.import_module(f"optiq.cli.{verb}").command
    names = [parameter.name for parameter in command.params]
    flags = [flag for parameter in command.params for flag in parameter.opts]
    assert len(names) == len(set(names))
    assert len(flags) == len(set(flags))


@given(
    seed=st.integers(-(2**31), 2**31),
    effort=st.sampled_from(typing.get_args(typing.get_type_hints(MeasureConfig)["effort"])),
    verify=st.booleans(),
)
def test_flags_and_file_agree(seed, effort, verify, tmp_path_factory):
    file = tmp_path_factory.mktemp("toml") / "o.toml"
    file.write_text(
        f'[measure]\nseed = {seed}\neffort = "{effort}"\nverify = {str(verify).lower()}\n'
    )
    words = [flag_name("seed"), str(seed), flag_name("effort"), effort]
    words += [flag_name("verify")] if verify else []
    assert parse(*words)[MeasureConfig] == parse("--config", str(file))[MeasureConfig]


def test_the_words_of_a_configuration_ask_for_the_same():
    """Only what differs from the defaults, in a form that the command line takes."""
    measure = MeasureConfig(effort="quick", calibration=Path("/home/me/own.jsonl"), verify=True)
    allocate = AllocateConfig(target_bpw=4.5, pin=("*.o_proj=6/64", "lm_head=bf16"))
    assert words_of(RunConfig(), measure, allocate) == (
        *("--effort", "quick", "--calibration", "own.jsonl", "--verify", "--target-bpw", "4.5"),
        *("--pin", "*.o_proj=6/64", "--pin", "lm_head=bf16"),
    )
    assert words_of(RunConfig(), MeasureConfig(), AllocateConfig()) == ()
