"""The command line as a user meets it: real processes, exit statuses, what is printed where."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oarsmith
from oarsmith import cli
from oarsmith.errors import ConfigError
from oarsmith.jobs import doctor

ROOT = Path(oarsmith.__file__).parents[1]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


def oarsmith_process(*words, folder=None, **more):
    return subprocess.run(
        [sys.executable, "-m", "oarsmith", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**more),
        timeout=120,
    )


def write_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "dataset_name_or_path": "d", **values}, indent=1))
    return path


def test_overview_lists_every_command_and_a_first_example(capsys):
    for words in ([], ["--help"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert "oarsmith quickstart" in text
        for name, command in cli.COMMANDS.items():
            assert f"  {name:<14}{command.summary}" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(capsys, name):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"oarsmith {name}: {cli.COMMANDS[name].summary}")
    assert cli.COMMANDS[name].example in text


def test_examples_of_the_help_are_real_command_lines():
    import shlex

    for command in cli.COMMANDS.values():
        cli.check(shlex.split(command.example)[1:])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"oarsmith {oarsmith.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chta"], "did you mean 'oarsmith chat'?"),
        (["frobnicate"], "'oarsmith --help' lists the commands"),
        (["sft", "m", "d", "--lerning_rate", "1"], "did you mean 'learning_rate'?"),
        (["sft", "missing.json"], "there is no such configuration file"),
        (["sft"], "'model_name_or_path' is required"),
        (["models", "--all"], "unknown key 'all'"),
    ],
)
def test_bad_input_is_a_block_without_a_traceback(capsys, words, message):
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_first_word_with_a_config_suffix_is_the_file(tmp_path):
    path = write_config(tmp_path, learning_rate=3e-5)
    resolved = cli.load("sft", [str(path), "--learning_rate", "1e-5"])
    assert resolved.config.learning_rate == 1e-5
    assert resolved.provenance["dataset_name_or_path"] == f"{path}:3"
    assert cli.split_config("sft", ["m", "d.json"]) == (None, ["m", "d.json"])
    assert cli.split_config("explain", ["a.yaml", "seed"]) == (None, ["a.yaml", "seed"])


def test_keys_without_effect_are_mentioned_once(tmp_path, capsys):
    path = write_config(tmp_path, use_fused_rope=True, lazy=False)
    cli._mention(cli.load("sft", [str(path)]))
    err = capsys.readouterr().err
    assert err.count("use_fused_rope") == 1 and "lazy" in err and len(err.splitlines()) == 1


def test_check_for_documentation():
    cli.check(["sft", "CONFIG.json", "--learning_rate", "LR"])
    cli.check(["--help"])
    for words in (["tune"], ["sft", "c.json", "--nope", "1"], ["chat", "a", "b"]):
        with pytest.raises(ConfigError):
            cli.check(words)


def test_an_unforeseen_error_is_one_line_and_a_file(tmp_path):
    code = "import oarsmith.cli as c, dataclasses as d; c.COMMANDS['doctor'] = d.replace(c.COMMANDS['doctor'], "
    code += "job='oarsmith.cli:absent'); c.main(['doctor'])"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(TMPDIR=str(tmp_path)))
    assert done.returncode == 1
    assert "this is a bug in oarsmith: KeyError" in done.stderr and "Traceback" not in done.stderr
    (report,) = tmp_path.glob("oarsmith-bug-*.txt")
    assert str(report) in done.stderr
    assert "Traceback" in report.read_text()
    shown = subprocess.run(words, capture_output=True, text=True, env=environment(OARSMITH_DEBUG="1"))
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_debugging_shows_where_an_error_was_raised():
    done = oarsmith_process("chta", OARSMITH_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ConfigError" in done.stderr


def test_a_closed_pipe_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-m", "oarsmith", "sft", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == cli.EXIT_BROKEN_PIPE


def test_an_interrupt_is_130(tmp_path):
    # explain waits for the end of a pipe it opens as its configuration: a job stopped in the middle of its work.
    fifo = tmp_path / "pipe.json"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, "-m", "oarsmith", "explain", str(fifo), "seed"], stderr=subprocess.PIPE, env=environment()
    ) as process:
        with fifo.open("w"):  # returns once the job has opened the other end
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == cli.EXIT_INTERRUPTED
        assert process.stderr.read() == b"interrupted\n"


def test_public_names_are_lazy():
    code = "import sys, oarsmith; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules); print(dir(oarsmith))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    for name in oarsmith.__all__:
        assert repr(name) in done.stdout


def test_public_names_exist():
    for name in oarsmith.__all__:
        assert vars(oarsmith).get(name, oarsmith.__getattr__(name) if name in oarsmith._HOME else None) is not None
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        oarsmith.load_modle  # noqa: B018


def test_explain_a_key_of_a_file(tmp_path, capsys):
    path = write_config(tmp_path, lora=1, use_flash_attention=True)
    assert cli.main(["explain", str(path), "learning_rate"]) == 0
    text = capsys.readouterr().out
    assert "learning_rate = 0.0002" in text
    assert "derived (2e-4 with an adapter" in text
    assert "Highest learning rate" in text
    cli.main(["explain", str(path), "lora"])
    assert f"from:     {path}:4" in capsys.readouterr().out
    cli.main(["explain", str(path), "use_flash_attention"])
    assert "without effect" in capsys.readouterr().out


def test_explain_everything(tmp_path, capsys):
    path = write_config(tmp_path, use_flash_attention=True)
    assert cli.main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    from oarsmith.config.sft import SftConfig

    for key in SftConfig.model_fields:
        assert f"\n  {key} " in text
    assert "Given, without effect:" in text


def test_explain_a_saved_run_and_a_bare_key(tmp_path, capsys):
    from oarsmith.config.resolved import RUN_FILE

    cli.load("generate", ["m", "hi", "--top_k", "3"]).save(tmp_path / RUN_FILE)
    assert cli.main(["explain", str(tmp_path), "temperature"]) == 0
    text = capsys.readouterr().out
    assert "temperature = 0.7" in text and "oarsmith generate" in text
    assert cli.main(["explain", "data_impl"]) == 0
    assert "not built yet" in capsys.readouterr().out
    assert cli.main(["explain", "kl_budget"]) == 0
    assert "oarsmith merge-adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["explain"], ["explain", "lerning_rate"], ["explain", "seed", "--job", "tune"], ["explain", "no.json"]]
)
def test_explain_what_does_not_exist(capsys, words):
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    assert "fix:" in capsys.readouterr().err


def test_models_lists_the_families(capsys):
    from oarsmith.models.families import known

    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    for family in known():
        assert any(f" {model_type} " in text for model_type in family.model_types), family.name


def test_doctor(tmp_path):
    done = oarsmith_process("doctor", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {line.split()[0] for line in done.stdout.splitlines() if line and not line.startswith(" ")}
    assert "ok" in states
    for subject in ("PyTorch", "CPU vectors", "threads", "fast operations", "memory", "disk", "can be written"):
        assert subject in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_knows_every_extra(monkeypatch):
    lines = [line.strip() for line in (ROOT.parent / "pyproject.toml").read_text().splitlines()]
    table = "\n".join(lines[lines.index("[project.optional-dependencies]") + 1 : lines.index("[project.scripts]")])
    extras = {
        name: re.findall(r'"([\w-]+)', words)
        for name, words in re.findall(r"^([\w-]+) = \[(.*?)\]$", table, re.M | re.S)
    }
    extras["dev"].remove("oarsmith")
    assert {name: packages for name, (_, packages) in doctor.EXTRAS.items()} == extras
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "alembic" else "1.2")
    found = {finding.text: finding.advice for finding in doctor._extras()}
    assert found["optional, there (tensorboard 1.2): report_to tensorboard"] is None
    assert (
        found["optional, not installed (alembic): report_to mlflow"] == "if you want it: pip install 'oarsmith[mlflow]'"
    )


def test_doctor_in_a_folder_that_cannot_be_written():
    done = oarsmith_process("doctor", folder="/proc")  # not even root can write there
    assert done.returncode == 1
    assert "cannot be written to" in done.stdout
