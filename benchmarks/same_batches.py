"""The batches that a command of ours trains on, written down for a peer: the same ids in the same order."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from oarsmith.config.load import load_config
from oarsmith.config.registry import config_class
from oarsmith.data.batch import Batch

IGNORED = -100


def write_batches(command: str, keys: dict[str, object], num_steps: int, path: Path) -> int:
    """Save the first `num_steps` batches of `oarsmith COMMAND --keys` as rows of documents, padded at the end.

    The file (.npz) has `ids` and `labels` [rows, longest] (a label is the token after; -100 where nothing is trained),
    `lengths` [rows] and `rows_per_step` [steps].

    Returns:
        The number of tokens in them, without padding.
    """
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    recipe = importlib.import_module(f"oarsmith.jobs.{command}").RECIPE
    resolved, start = recipe.start(load_config(config_class(command), None, words), torch.device("cpu"))
    loader = recipe.build_data(resolved.config, start, recipe.tokenizer(resolved.config)).train
    batches: list[Batch] = []
    while len(batches) < num_steps:
        batches += islice(loader, num_steps - len(batches))
    documents = [document for batch in batches for document in _documents(batch)]
    lengths = np.array([len(ids) for ids, _ in documents])
    ids_NL = np.zeros((len(documents), lengths.max()), np.int32)
    labels_NL = np.full_like(ids_NL, IGNORED)
    for row, (ids, labels) in enumerate(documents):
        ids_NL[row, : len(ids)], labels_NL[row, : len(ids)] = ids, labels
    counts = np.array([len(batch.bounds) - 1 for batch in batches])
    np.savez(path, ids=ids_NL, labels=labels_NL, lengths=lengths, rows_per_step=counts)
    return int(lengths.sum())


def _documents(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    labels_T = np.where(batch.weights.numpy() > 0, batch.targets.numpy(), IGNORED)
    places = [slice(*bounds) for bounds in zip(batch.bounds[:-1], batch.bounds[1:], strict=True)]
    return [(batch.input_ids.numpy()[place], labels_T[place]) for place in places]
