"""Checkpoints written in the background hold what training held when they were asked for."""

import threading

import pytest
import torch

from oarsmith.checkpoint.hf import write_decoder
from oarsmith.errors import CheckpointError
from oarsmith.training.checkpoint import CheckpointStore, read_checkpoint
from oarsmith.training.saver import Saver
from tiny import tiny_decoder


def saver_into(folder, write=write_decoder, *, background=True, keep=None):
    return Saver(store=CheckpointStore(folder, keep=keep), write_model=write, background=background)


def change(model, tensors):
    with torch.no_grad():
        for tensor in (*model.parameters(), *tensors.values()):
            tensor.add_(1)


def test_the_file_is_that_of_a_save_that_waited(tmp_path):
    gate = threading.Event()

    def write_late(model, folder):
        gate.wait(timeout=60)
        write_decoder(model, folder)

    model, tensors = tiny_decoder(), {"w/exp_avg": torch.arange(3.0)}
    saver_into(tmp_path / "plain", background=False).save(1, model, tensors, {"a": 1}, None)
    saver = saver_into(tmp_path / "late", write_late)
    saver.save(1, model, tensors, {"a": 1}, None)
    change(model, tensors)
    gate.set()
    saver.finish()
    plain, late = tmp_path / "plain" / "checkpoint-1", tmp_path / "late" / "checkpoint-1"
    assert (late / "manifest.json").read_bytes() == (plain / "manifest.json").read_bytes()
    assert read_checkpoint(late)[0]["w/exp_avg"].tolist() == [0, 1, 2]


def test_frozen_weights_are_not_copied(tmp_path):
    model, seen = tiny_decoder(lora_rank=2), []
    saver = saver_into(tmp_path, lambda twin, folder: seen.append(twin))
    saver.save(1, model, {}, {}, None)
    saver.finish()
    pairs = zip(model.parameters(), seen[0].parameters(), strict=True)
    assert all((mine is kept) is not mine.requires_grad for mine, kept in pairs)


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path):
    def fail(model, folder):
        raise OSError(28, "No space left on device")

    saver = saver_into(tmp_path, fail)
    saver.save(1, tiny_decoder(), {}, {}, None)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.finish()
    saver.finish()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_saves_come_one_after_the_other_and_old_ones_go(tmp_path):
    saver = saver_into(tmp_path, keep=1)
    model = tiny_decoder()
    for step in (1, 2, 3):
        saver.save(step, model, {}, {}, 1)
    saver.finish()
    assert saver.store.steps() == [1, 3], "the best one stays"
