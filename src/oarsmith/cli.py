"""The command line: a table of commands. It parses the words, then calls one job.

Only the standard library is imported at the top, so that ``oarsmith --help`` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from oarsmith import processes
from oarsmith._version import __version__
from oarsmith.commands import COMMANDS, Command
from oarsmith.errors import ConfigError, OarsmithError

if TYPE_CHECKING:
    from oarsmith.config.base import JobConfig
    from oarsmith.config.resolved import Resolved

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# Seconds that other processes of a run leave the main one to say what is wrong.
_OTHERS_WAIT_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status.

    0 success, 1 a bug or a failed check, 2 something the user can correct, 130 interrupted, 143 stopped by SIGTERM.
    """
    sys.excepthook = _report_bug
    # Waiting threads spin for some 20 us and then sleep; it must be said before PyTorch loads its OpenMP runtime. GNU's
    # default of milliseconds wastes the cores of a busy machine: training went from 27 to 137 tokens/s there (LOG.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        status = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except OarsmithError as error:
        if _debugging():
            raise
        if not processes.is_main():
            # Most errors are everybody's. The main process speaks first, and its end ends the others.
            time.sleep(_OTHERS_WAIT_S)
            print(f"[process {processes.rank()}]", file=sys.stderr)
        print(_block(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if _debugging() or error.errno not in _EVERYDAY_ERRORS:
            raise
        print(f"error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return EXIT_BAD_INPUT


_EVERYDAY_ERRORS = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT}


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0
    if words[0] in {"-V", "--version"}:
        print(f"oarsmith {__version__}")
        return 0
    name, command = _command(words[0])
    if any(word in {"-h", "--help"} for word in words[1:]):
        print(_command_help(name, command))
        return 0
    resolved = load(name, words[1:])
    _mention(resolved)
    if _starts_others(resolved.config):
        from oarsmith.jobs.launch import launch

        return launch(resolved.config, words)
    module, function = command.job.split(":")
    run: Callable[[Resolved[Any]], int | None] = vars(importlib.import_module(module))[function]
    return run(resolved) or 0


def _starts_others(config: JobConfig) -> bool:
    """Whether the command is to run as several processes, and this is not one of them yet."""
    from oarsmith.config.parallel import ParallelKeys

    return isinstance(config, ParallelKeys) and config.spreads and not processes.started_by_an_agent()


def load(name: str, words: Sequence[str]) -> Resolved[Any]:
    """The configuration that a command and the words after it stand for."""
    from oarsmith.config.load import load_config

    path, overrides = split_config(name, words)
    return load_config(_config_class(name), path, overrides)


def check(words: Sequence[str]) -> None:
    """Check that a command line names a real command and real keys, without running it (for documentation).

    Raises:
        ConfigError: an unknown command, key or a word in the wrong place.
    """
    from oarsmith.config.load import check_keys

    if words and words[0] not in {"-h", "--help", "--version"}:
        name, _ = _command(words[0])
        rest = [word for word in words[1:] if word not in {"-h", "--help"}]
        check_keys(_config_class(name), split_config(name, rest)[1])


def split_config(name: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration file (a first word with its suffix), and the other words."""
    first = words[0] if words and not words[0].startswith("-") else ""
    if COMMANDS[name].reads_config and first.lower().endswith(CONFIG_SUFFIXES):
        return words[0], list(words[1:])
    return None, list(words)


def _config_class(name: str) -> type[JobConfig]:
    from oarsmith.config.registry import config_class

    return config_class(name)


def _command(name: str) -> tuple[str, Command]:
    known = name.replace("_", "-")
    if known in COMMANDS:
        return known, COMMANDS[known]
    import difflib

    guess = difflib.get_close_matches(known, COMMANDS, n=1)
    raise ConfigError(
        f"there is no command '{name}'",
        fix=f"did you mean 'oarsmith {guess[0]}'?" if guess else "'oarsmith --help' lists the commands",
    )


def _overview() -> str:
    lines = ["Oarsmith: train, fine-tune, merge, convert and run language models.", ""]
    lines += ["usage: oarsmith COMMAND [CONFIG.json|CONFIG.yaml] [--key value ...]", ""]
    lines += ["Start here (a few minutes on a CPU):", "  oarsmith quickstart", ""]
    lines += ["Then with your own rows:"]
    lines += ["  oarsmith sft model/ train.jsonl --lora --output_dir runs/mine", "  oarsmith chat runs/mine"]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items() if command.group == group]
    lines += [
        "",
        "oarsmith COMMAND --help   its keys, with defaults",
        "oarsmith doctor           is this computer ready?",
    ]
    return "\n".join(lines)


def _command_help(name: str, command: Command) -> str:
    from oarsmith.config.help import keys_help

    config = _config_class(name)
    lines = [f"oarsmith {name}: {command.summary}", "", f"usage: oarsmith {name} {command.usage} [--key value ...]"]
    lines += [f"e.g.   {command.example}"]
    if command.reads_config and config.model_fields:
        lines += ["", "CONFIG is a JSON or YAML file of the keys below; keys on the command line win over it."]
        lines += ["--key value, --key=value; a bare --key means true; null means not given."]
    return "\n".join(lines) + "\n" + keys_help(config, width=min(shutil.get_terminal_size().columns, 110))


def _mention(resolved: Resolved[Any]) -> None:
    """Say once what was read but changes nothing."""
    if not processes.is_main():
        return
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr)
    if resolved.without_effect:
        names = ", ".join(resolved.without_effect)
        print(f"note: keys without an effect here: {names} ('oarsmith explain CONFIG KEY' says why)", file=sys.stderr)


def _block(error: OarsmithError) -> str:
    lines = [f"{error.headline}: {error.what}"]
    if error.where:
        lines.append(f"  where: {error.where}")
    if error.fix:
        lines.append(f"  fix:   {error.fix}")
    return "\n".join(lines)


def _debugging() -> bool:
    return os.environ.get("OARSMITH_DEBUG", "") not in {"", "0"}


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The handler for what no job foresaw: one line for the user, the traceback in a file (or here, for debugging)."""
    text = "".join(traceback.format_exception(kind, error, trace))
    if _debugging():
        sys.stderr.write(text)
        return
    descriptor, path = tempfile.mkstemp(prefix="oarsmith-bug-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"oarsmith {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
        file.write(f"command: {' '.join(sys.argv)}\n\n{text}")
    print(f"this is a bug in oarsmith: {kind.__name__}: {error}", file=sys.stderr)
    print(f"  the traceback is in {path} (OARSMITH_DEBUG=1 shows it here)", file=sys.stderr)
