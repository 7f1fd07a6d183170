"""``oarsmith generate --input_file``: rows in, answers out in their order, and going on after an interruption."""

import fcntl
import json
import shutil
from itertools import islice

import pytest
from rich.console import Console

import oarsmith
from oarsmith import cli
from oarsmith.config.inference import GenerateConfig
from oarsmith.config.load import load_config
from oarsmith.jobs import answer_file
from oarsmith.jobs.answer_file import Answering
from oarsmith.jobs.kept_answers import keep_answers
from oarsmith.jobs.prompt_rows import read_rows
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.jobs.row_sampling import RowSampling
from tiny import read_lines, write_tiny_model

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("answering") / "model")


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


def prompts(count, **more):
    # Different lengths, so that answers do not end in the order in which they began.
    return [{"prompt": f"Say {n}." + " Slowly." * (n % 4), **more} for n in range(count)]


def generate(folder, model, *words):
    given = ["--input_file", folder / "in.jsonl", "--output_file", folder / "out.jsonl", "--max_new_tokens", 6, *words]
    return cli.main(["generate", str(model), *map(str, given)])


def outputs(folder):
    return read_lines(folder / "out.jsonl")


def interrupted(folder, model, count, *words):
    """Answer ``count`` rows, and fail at the one behind them."""
    rows = read_lines(folder / "in.jsonl")
    write(folder / "in.jsonl", [*rows[:count], {"prompt": "long " * 400}])
    # One after another: then all rows before the bad one are answered.
    assert generate(folder, model, "--batch_size", 1, *words) == cli.EXIT_BAD_INPUT
    write(folder / "in.jsonl", rows)


@pytest.fixture
def one_by_one(monkeypatch):
    """No row is begun before the one in front of it is answered."""
    monkeypatch.setattr(answer_file, "MOST_AHEAD", 1)


def test_rows_are_answered_in_order_as_the_engine_answers_a_list(model, tmp_path):
    rows = prompts(23)
    write(tmp_path / "in.jsonl", rows)
    assert generate(tmp_path, model, "--temperature", 0.9, "--seed", 5, "--batch_size", 3) == 0
    found = outputs(tmp_path)
    assert [line["prompt"] for line in found] == [row["prompt"] for row in rows]
    engine = oarsmith.Engine(model, batch_size=5)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    expected = engine.generate(chats, oarsmith.Sampling(temperature=0.9, seed=5, max_new_tokens=6))
    assert [line["output"] for line in found] == [completion.text for completion in expected]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_memory_holds_a_window_of_rows(model, tmp_path, monkeypatch):
    """However long the file is: what was read and is not written yet stays within a bound."""
    monkeypatch.setattr(answer_file, "MOST_AHEAD", 10)
    # The first row takes longest; the others must not run away from it.
    rows = [{"prompt": "a", "sampling": {"max_new_tokens": 120, "ignore_eos": True}}, *prompts(80)]
    write(tmp_path / "in.jsonl", rows)
    resolved = load_config(GenerateConfig, None, [str(model), "--input_file=i", "--output_file=o", "--max_tokens=2"])
    engine, read, most = oarsmith.Engine(model, batch_size=2), 0, 0

    with keep_answers(tmp_path / "out.jsonl", {}) as kept:

        def watched():
            nonlocal read, most
            for row in read_rows(str(tmp_path / "in.jsonl")):
                read += 1
                most = max(most, read - kept.num_done)
                yield row

        with RowProgress(Console(quiet=True), 0, len(rows)) as progress:
            sampling = RowSampling(resolved)
            Answering(engine, lambda row: engine.encode(row.text), sampling, kept, progress, skip=False).run(watched())
    assert most == 10
    assert [line["prompt"] for line in outputs(tmp_path)] == [row["prompt"] for row in rows]


def test_rows_may_have_sampling_of_their_own(model, tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "sampling": {"max_tokens": 3}},
        {"prompt": "a", "sampling": {"temperature": 50, "seed": 1}},
        {"prompt": "a", "sampling": {"temperature": 50, "seed": 1}},
        {"prompt": "a", "sampling": {"temperature": 50, "seed": 2, "n": 2, "logprobs": 1}},
        {"prompt": "a", "sampling": {"top_p": 0.99, "temperature": None}},
        {"prompt": "a", "sampling": None},
    ]
    write(tmp_path / "in.jsonl", rows)
    assert generate(tmp_path, model, "--ignore_eos") == 0
    found = outputs(tmp_path)
    assert [line["num_tokens"] for line in found] == [6, 3, 6, 6, 6, 6, 6]
    greedy, short, one, again, two, filtered, nothing = (line["output"] for line in found)
    assert greedy.startswith(short) and greedy == nothing
    # Its own seed: its place among the rows does not matter.
    assert one == again != two
    assert len(found[4]["others"]) == 1 and len(found[4]["logprobs"]) == 6
    # A filter asks for draws, as on the command line.
    assert filtered != greedy


def test_a_stop_text_of_a_row(chain_model, tmp_path):
    rows = [{"prompt": "a", "sampling": {"max_tokens": 20, **own}} for own in ({"stop": [" STOP"]}, {})]
    write(tmp_path / "in.jsonl", rows)
    assert generate(tmp_path, chain_model("one two STOP")) == 0
    assert [line["output"] for line in outputs(tmp_path)] == ["one two", "one two STOP"]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 1}, "'temprature' is not for the 'sampling' of a row"),
        ({"model_name_or_path": "other"}, "'model_name_or_path' is not for"),
        ({"temperature": -1}, "temperature = -1: must be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature = 'hot': must be a number"),
        ({"n": 2, "best_of": 1}, "best_of 1 is less than n 2"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "are the same key with different values"),
        ({"grammar": "/etc/hostname"}, "the name of a file"),
        ({"regex": "a", "choices": ["b"]}, "an answer can be held to one of"),
        ({"stop": [""]}, "texts that are not empty"),
        ([1], "field 'sampling' is a list of 1"),
    ],
)
def test_sampling_that_cannot_be_names_the_row(tmp_path, capsys, model, sampling, message):
    write(tmp_path / "in.jsonl", [{"prompt": "a"}, "", {"prompt": "a", "sampling": sampling}])
    assert generate(tmp_path, model) == cli.EXIT_BAD_INPUT
    printed = " ".join(capsys.readouterr().err.split())
    assert "in.jsonl:3" in printed and message in printed
    # Found before anything was computed: nothing is left.
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


BAD = ["{", {"prompt": 3}, {"prompt": "fine"}, {"question": "a"}, {"prompt": "long " * 400}, {"prompt": "fine too"}]


def test_all_bad_rows_are_named_before_it_stops(model, tmp_path, capsys):
    write(tmp_path / "in.jsonl", BAD)
    assert generate(tmp_path, model) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert all(f"in.jsonl:{line}: " in printed for line in (1, 2, 4))
    assert "3 of 6 rows cannot be answered" in printed and "--on_malformed skip" in printed


def test_bad_rows_can_be_skipped_and_keep_their_lines(model, tmp_path, capsys):
    write(tmp_path / "in.jsonl", BAD)
    assert generate(tmp_path, model, "--on_malformed", "skip") == 0
    printed = capsys.readouterr().err
    assert all(f"in.jsonl:{line}: " in printed for line in (1, 2, 4, 5))
    assert "6 answers in" in printed and "4 of them errors" in printed
    found = outputs(tmp_path)
    assert ["error" in line for line in found] == [True, True, False, True, True, False]
    assert "leaves no room for an answer" in found[4]["error"]
    assert found[4]["prompt"] == BAD[4]["prompt"] and found[5]["prompt"] == "fine too"


def test_it_goes_on_behind_the_last_answer(model, tmp_path, capsys, one_by_one):
    write(tmp_path / "in.jsonl", prompts(9))
    assert generate(tmp_path, model) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    interrupted(tmp_path, model, 4)
    assert "4 of 5 rows are answered; the same command goes on" in capsys.readouterr().err
    partial = tmp_path / "out.jsonl.partial"
    # Torn in the middle of a line, as a killed process leaves it.
    with (partial / "answers.jsonl").open("ab") as file:
        file.write(b'{"prompt": "Sa')
    assert not (tmp_path / "out.jsonl").exists()
    # What only says how much is done at a time may be another.
    assert generate(tmp_path, model, "--batch_size", 3, "--num_threads", 1) == 0
    assert "going on behind row 4 of 9" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert not partial.exists()


def test_an_answer_that_was_changed_is_made_again(model, tmp_path, capsys, one_by_one):
    write(tmp_path / "in.jsonl", prompts(6))
    interrupted(tmp_path, model, 5)
    answers = tmp_path / "out.jsonl.partial" / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join([*lines[:2], lines[2].replace(b"output", b"0utput"), *lines[3:]]))
    assert generate(tmp_path, model) == 0
    assert "going on behind row 2 of 6" in capsys.readouterr().err
    assert all("output" in line for line in outputs(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{"prompt": "other"}, *rows[1:]], "row 1 is not the one that was answered"),
        (lambda rows: [*rows[:2], {**rows[2], "sampling": {"top_k": 2}}, *rows[3:]], "row 3 is not the one"),
        (lambda rows: rows[:2], "the file has 2 rows, and 3 were answered"),
    ],
)
def test_a_changed_input_is_refused(model, tmp_path, capsys, one_by_one, change, message):
    rows = prompts(5)
    write(tmp_path / "in.jsonl", rows)
    interrupted(tmp_path, model, 3)
    write(tmp_path / "in.jsonl", change(rows))
    assert generate(tmp_path, model) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert message in printed and "--overwrite_output_file" in printed
    assert generate(tmp_path, model, "--overwrite_output_file") == 0
    assert len(outputs(tmp_path)) == len(change(rows))


def test_rows_behind_the_answers_may_change(model, tmp_path, one_by_one):
    rows = prompts(5)
    write(tmp_path / "in.jsonl", rows)
    interrupted(tmp_path, model, 3)
    write(tmp_path / "in.jsonl", [*rows[:3], {"prompt": "new"}, *prompts(3)])
    assert generate(tmp_path, model) == 0
    assert [line["prompt"] for line in outputs(tmp_path)][3:5] == ["new", "Say 0."]


def test_other_settings_are_refused_and_named(model, tmp_path, capsys, one_by_one):
    write(tmp_path / "in.jsonl", prompts(4))
    interrupted(tmp_path, model, 2)
    for words, said in [
        (["--temperature", "0.5"], "another temperature"),
        (["--system", "Be brief."], "system null"),
        (["--repetition_penalty", "1.5"], "repetition_penalty null"),
    ]:
        assert generate(tmp_path, model, *words) == cli.EXIT_BAD_INPUT
        printed = capsys.readouterr().err
        assert "the answers that are there were made with" in printed
        assert said.removeprefix("another ") in printed
    assert generate(tmp_path, model) == 0


def test_another_model_in_the_same_place_is_refused(model, tmp_path, capsys, one_by_one):
    mine = tmp_path / "model"
    shutil.copytree(model, mine)
    write(tmp_path / "in.jsonl", prompts(4))
    interrupted(tmp_path, mine, 2)
    shutil.rmtree(mine)
    shutil.copytree(model, mine)  # the same content, other times
    interrupted(tmp_path, mine, 3)
    write_tiny_model(mine, seed=1)
    assert generate(tmp_path, mine) == cli.EXIT_BAD_INPUT
    assert "another content of the model's files" in capsys.readouterr().err


def test_killed_when_only_the_folder_had_to_go(model, tmp_path, capsys, one_by_one):
    write(tmp_path / "in.jsonl", prompts(3))
    interrupted(tmp_path, model, 2)
    partial, kept = tmp_path / "out.jsonl.partial", tmp_path / "kept"
    shutil.copytree(partial, kept)
    assert generate(tmp_path, model) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    # As it was just after the answers had been moved: their digests are there, they are not.
    with keep_answers(tmp_path / "other.jsonl", {}) as made:
        for row, line in zip(read_rows(str(tmp_path / "in.jsonl")), whole.splitlines(), strict=True):
            made.append(row.digest, line)
        shutil.copy(made.folder / "rows.txt", kept / "rows.txt")
    (kept / "answers.jsonl").unlink()
    kept.rename(partial)
    capsys.readouterr()
    assert generate(tmp_path, model) == 0
    assert "going on behind row 3 of 3" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert not partial.exists()


def test_two_processes_do_not_write_into_one_file(model, tmp_path, capsys):
    write(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl.partial").mkdir()
    with (tmp_path / "out.jsonl.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert generate(tmp_path, model) == cli.EXIT_BAD_INPUT
    assert "another process is answering into this file" in capsys.readouterr().err
    assert generate(tmp_path, model) == 0


def test_progress_where_there_is_no_terminal(monkeypatch, capsys):
    from oarsmith.jobs import row_progress

    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(row_progress.time, "perf_counter", lambda: float(next(clock)))
    with RowProgress(Console(force_terminal=False, width=40), 2, 10) as progress:
        for _ in range(4):
            progress.add(50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 of 10 rows, 2.5 tokens/s, about 2 min 0 s left"
    assert lines[-1] == "200 tokens in 1 min 40 s (2.0 tokens/s)"


def test_digests_follow_from_content_alone(tmp_path):
    write(tmp_path / "a.jsonl", ['{"a": 1, "b": "x"}', "", '{"b": "x", "a": 1}', "{", "{ "])
    write(tmp_path / "b.jsonl", ['{"b": "x", "a": 1}'])
    first, same, broken, also = (row.digest for row in read_rows(str(tmp_path / "a.jsonl")))
    assert first == same == next(islice(read_rows(str(tmp_path / "b.jsonl")), 1)).digest
    assert len({first, broken, also}) == 3
