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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from oarsmith._version import __version__
from oarsmith.errors import ConfigError, OarsmithError

if TYPE_CHECKING:
    from oarsmith.config.base import JobConfig
    from oarsmith.config.resolved import Resolved

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        group: heading it stands under in the overview.
        summary: one line.
        job: ``module:function``; the function takes the resolved configuration and returns an exit status or None.
        usage: the words after the command's name.
        example: a command line that works.
        reads_config: whether a first word that ends in .json, .yaml or .yml is its configuration file.
    """

    group: str
    summary: str
    job: str
    usage: str
    example: str
    reads_config: bool = True


_TRAIN, _RUN, _REWRITE, _LOOK = "Train", "Ask", "Rewrite weights", "Look and check"

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        _TRAIN,
        "fine-tune a small model on this computer and compare its answers, in minutes",
        "oarsmith.jobs.quickstart:run",
        "[FOLDER]",
        "oarsmith quickstart",
    ),
    "preprocess": Command(
        _TRAIN,
        "turn raw text into token files for pretraining; train a tokenizer; merge token files",
        "oarsmith.jobs.preprocess:run",
        "CONFIG | INPUT_PATH OUTPUT_PREFIX",
        "oarsmith preprocess corpus/ data/train --tokenizer_name_or_path model/",
    ),
    "pretrain": Command(
        _TRAIN,
        "train a model on an indexed corpus, from scratch or further",
        "oarsmith.jobs.pretrain:run",
        "CONFIG | MODEL CORPUS",
        "oarsmith pretrain model/ data/corpus --max_steps 1000",
    ),
    "sft": Command(
        _TRAIN,
        "fine-tune a model on conversations, all weights or LoRA",
        "oarsmith.jobs.sft:run",
        "CONFIG | MODEL DATA",
        "oarsmith sft config.json --learning_rate 1e-5",
    ),
    "dpo": Command(
        _TRAIN,
        "train on pairs of answers of which one is preferred: DPO and its relatives",
        "oarsmith.jobs.dpo:run",
        "CONFIG | MODEL DATA",
        "oarsmith dpo runs/sft pairs.jsonl --lora --loss_type sigmoid",
    ),
    "kto": Command(
        _TRAIN,
        "train on single answers that are good or bad: KTO",
        "oarsmith.jobs.kto:run",
        "CONFIG | MODEL DATA",
        "oarsmith kto runs/sft judged.jsonl --lora",
    ),
    "reward": Command(
        _TRAIN,
        "train a reward model: one that scores answers, or judges their steps",
        "oarsmith.jobs.reward:run",
        "CONFIG | MODEL DATA",
        "oarsmith reward runs/sft pairs.jsonl --lora",
    ),
    "compare": Command(
        _TRAIN,
        "fine-tune by several methods on the same data: one table, one picture",
        "oarsmith.jobs.compare:run",
        "CONFIG | MODEL DATA",
        "oarsmith compare model/ train.jsonl --methods full,lora,dora --max_steps 100",
    ),
    "generate": Command(
        _RUN,
        "answer a prompt, or a file of prompts into a file",
        "oarsmith.jobs.generate:run",
        "MODEL PROMPT",
        "oarsmith generate runs/sft 'Who are you?'",
    ),
    "chat": Command(
        _RUN, "talk to a model in the terminal", "oarsmith.jobs.chat:run", "MODEL", "oarsmith chat runs/sft"
    ),
    "serve": Command(
        _RUN,
        "serve a model: OpenAI's API, KServe over HTTP and gRPC, a page to chat on",
        "oarsmith.jobs.serve:run",
        "MODEL",
        "oarsmith serve model/ --port 8011",
    ),
    "request": Command(
        _RUN,
        "ask a server over HTTP",
        "oarsmith.jobs.request:run",
        "PROMPT",
        "oarsmith request 'Who are you?' --url http://127.0.0.1:8011",
    ),
    "convert": Command(
        _REWRITE,
        "bring a model or adapter into another layout: Hugging Face, .bin, GGUF, PaddleNLP",
        "oarsmith.jobs.convert:run",
        "SOURCE DESTINATION",
        "oarsmith convert model.gguf model/",
    ),
    "export": Command(
        _REWRITE,
        "compile a model into a package that runs without its code",
        "oarsmith.jobs.export:run",
        "MODEL FOLDER",
        "oarsmith export model/ compiled/",
    ),
    "merge": Command(
        _REWRITE,
        "merge models, by any method, tensor by tensor; stack layers, make a mixture, extract an adapter",
        "oarsmith.jobs.merge:run",
        "RECIPE OUT",
        "oarsmith merge recipe.yaml merged/",
    ),
    "merge-adapter": Command(
        _REWRITE,
        "put an adapter into its base model and prove the merge, or take it off again",
        "oarsmith.jobs.merge_adapter:run",
        "ADAPTER [FOLDER]",
        "oarsmith merge-adapter runs/sft merged/",
    ),
    "quantize": Command(
        _REWRITE,
        "write a model in fewer bits, and prove what that cost",
        "oarsmith.jobs.quantize:run",
        "CONFIG | MODEL OUT",
        "oarsmith quantize model/ small/ --scheme w4a16 --calibration text.txt",
    ),
    "eval": Command(
        _LOOK,
        "measure a model: perplexity of a text, loss on rows, tasks of lm-evaluation-harness",
        "oarsmith.jobs.eval:run",
        "MODEL FILE",
        "oarsmith eval runs/sft test.jsonl",
    ),
    "bench": Command(
        _LOOK,
        "measure how fast a model answers: latency, throughput, memory; beside other engines",
        "oarsmith.jobs.bench:run",
        "MODEL",
        "oarsmith bench model/ --compare transformers",
    ),
    "preview": Command(
        _LOOK,
        "show the tokens a run would train on, coloured by loss weight",
        "oarsmith.jobs.preview:run",
        "CONFIG | MODEL DATA",
        "oarsmith preview model/ train.jsonl",
    ),
    "replay": Command(
        _LOOK,
        "run one training step that went wrong again, alone, and show it layer by layer",
        "oarsmith.jobs.replay:run",
        "FAILURE_FOLDER",
        "oarsmith replay runs/sft/failure-step-120 --dtype fp32",
        reads_config=False,
    ),
    "explain": Command(
        _LOOK,
        "say what a configuration key is, its value and where that came from",
        "oarsmith.jobs.explain:run",
        "[CONFIG | RUN] [KEY]",
        "oarsmith explain config.json learning_rate",
        reads_config=False,
    ),
    "models": Command(
        _LOOK, "list the model families", "oarsmith.jobs.models:run", "", "oarsmith models", reads_config=False
    ),
    "doctor": Command(
        _LOOK,
        "check this computer: PyTorch, CPU, memory, disk, packages",
        "oarsmith.jobs.doctor:run",
        "",
        "oarsmith doctor",
        reads_config=False,
    ),
}


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
    module, function = command.job.split(":")
    run: Callable[[Resolved[Any]], int | None] = vars(importlib.import_module(module))[function]
    return run(resolved) or 0


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
