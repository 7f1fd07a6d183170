"""The record of a run, and how a resumed run rewinds it."""

from oarsmith.training.log import RunLog, peak_memory_mb, read_log


def test_append_and_read(tmp_path):
    log = RunLog(tmp_path)
    log.append({"step": 1, "loss": 0.1 + 0.2})
    log.append_timing({"step": 1, "tokens_per_second": 5.0})
    assert log.records() == [{"step": 1, "loss": 0.30000000000000004}]
    assert log.timings() == [{"step": 1, "tokens_per_second": 5.0}]


def test_rewind_forgets_later_steps_and_a_line_cut_off(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.append({"step": step})
        log.append_timing({"step": step})
    log.append({"step": 3, "eval_loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    before = log.path.read_bytes().splitlines(keepends=True)
    log.rewind(3)
    assert log.records() == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 3, "eval_loss": 1.0}]
    assert log.timings() == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert log.path.read_bytes().splitlines(keepends=True)[:3] == before[:3]


def test_rewind_to_the_start(tmp_path):
    log = RunLog(tmp_path)
    log.append({"step": 1})
    log.rewind(0)
    assert log.records() == log.timings() == []


def test_a_log_cut_within_a_character(tmp_path):
    (tmp_path / "log.jsonl").write_bytes('{"step": 1}\n{"step": 2, "note": "ü'.encode()[:-1])
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_no_log(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_peak_memory_is_of_this_process():
    assert 30 < peak_memory_mb() < 200_000
