"""The engines of `benchmarks/engine.py`, in the form of those of `oarsmith bench`, two of which are used as they are.

Each answers greedily, a given number of tokens, and notes when every token came. All requests of a call are there at
once. Nothing is imported at the top that one engine would have to pay for in the place of another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oarsmith.jobs.bench_systems import Answer, OpenVino, Request, System, Task, Transformers


class Ours:
    """The Python API."""

    def __init__(self, task: Task) -> None:
        from oarsmith.engine import Engine, Sampling

        config = task.config
        self._engine = Engine(
            task.model,
            weights=config["weights"],
            num_threads=config["num_threads"],
            batch_size=config["concurrency"],
        )
        self._sampling = Sampling

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        engine = self._engine
        engine.forget()
        answers = []
        for number, (ids, size) in enumerate(requests):
            answers.append(Answer(time.perf_counter()))
            engine.add(ids, self._sampling(max_new_tokens=size, ignore_eos=True), id=str(number))
        while engine.busy:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                if output.choice is not None:
                    answers[int(output.id)].add(output.choice.token)
        return answers

    def versions(self) -> dict[str, str]:
        from oarsmith import __version__
        from oarsmith.native.library import level

        return {"oarsmith": __version__, "instructions": level()}


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python brings: prompts in batches of 2,048, then all together.

    The best token is found by numpy; llama.cpp's own samplers take longer for that.
    """

    def __init__(self, task: Task) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(task.model.encode(), model_params)
        params, concurrency = llama_cpp.llama_context_default_params(), task.config["concurrency"]
        params.n_ctx = concurrency * -(-task.context // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, concurrency
        params.n_threads = params.n_threads_batch = task.config["num_threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        answers = [Answer(time.perf_counter()) for _ in requests]
        rows = [
            (token, position, number, position == len(ids) - 1)
            for number, (ids, _) in enumerate(requests)
            for position, token in enumerate(ids)
        ]
        for start in range(0, len(rows), 2048):
            self._decode(rows[start : start + 2048], answers)
        while waiting := [n for n, (_, size) in enumerate(requests) if len(answers[n].ids) < size]:
            lengths = {n: len(requests[n][0]) + len(answers[n].ids) for n in waiting}
            self._decode([(answers[n].ids[-1], lengths[n] - 1, n, True) for n in waiting], answers)
        return answers

    def _decode(self, rows: list[tuple[int, int, int, bool]], answers: list[Answer]) -> None:
        """One call: rows of (token, position, sequence, whether what follows is asked for)."""
        import numpy

        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, wanted
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for row, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = self._library.llama_get_logits_ith(self._context, row)
                answers[sequence].add(int(numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))

    def versions(self) -> dict[str, str]:
        info = self._library.llama_print_system_info().decode()
        return {"llama-cpp-python": self._library.__version__, "built for": " ".join(info.split())}


class OnnxRuntime:
    """onnxruntime-genai; several requests are one batch, padded on the left."""

    def __init__(self, task: Task) -> None:
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(task.model)
        # By itself it takes one thread here.
        options = {"intra_op_num_threads": task.config["num_threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._pad = json.loads((Path(task.model) / "genai_config.json").read_text())["model"]["pad_token_id"]

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        import numpy

        answers = [Answer(time.perf_counter()) for _ in requests]
        longest, most = max(len(ids) for ids, _ in requests), max(size for _, size in requests)
        params = self._library.GeneratorParams(self._model)
        # As long as the longest at least: so no answer ends early.
        length = longest + most
        params.set_search_options(do_sample=False, batch_size=len(requests), min_length=length, max_length=length)
        generator = self._library.Generator(self._model, params)
        rows = [[self._pad] * (longest - len(ids)) + list(ids) for ids, _ in requests]
        generator.append_tokens(numpy.array(rows, dtype=numpy.int32))
        for _ in range(most):
            generator.generate_next_token()
            for (_, size), answer, token in zip(requests, answers, generator.get_next_tokens(), strict=True):
                if len(answer.ids) < size:
                    answer.add(int(token))
        return answers

    def versions(self) -> dict[str, str]:
        return {"onnxruntime-genai": self._library.__version__}


class CTranslate2:
    """CTranslate2's generator; several requests are one batch."""

    def __init__(self, task: Task) -> None:
        import ctranslate2

        self._version = ctranslate2.__version__
        threads = task.config["num_threads"]
        self._generator: Any = ctranslate2.Generator(
            task.model, device="cpu", intra_threads=threads, compute_type=task.config["weights"]
        )
        self._tokens = json.loads((Path(task.model) / "vocabulary.json").read_text(encoding="utf-8"))

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        answers = [Answer(time.perf_counter()) for _ in requests]
        most = max(size for _, size in requests)

        def note(result: Any) -> bool:
            answers[result.batch_id].add(result.token_id)
            return False

        self._generator.generate_batch(
            [[self._tokens[index] for index in ids] for ids, _ in requests],
            max_length=most,
            min_length=most,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=note,
        )
        for (_, size), answer in zip(requests, answers, strict=True):
            del answer.ids[size:], answer.times[size:]
        return answers

    def versions(self) -> dict[str, str]:
        return {"ctranslate2": self._version}


SYSTEMS: dict[str, Callable[[Task], System]] = {
    "oarsmith": Ours,
    "llama.cpp": LlamaCpp,
    "openvino-genai": OpenVino,
    "onnxruntime-genai": OnnxRuntime,
    "ctranslate2": CTranslate2,
    "transformers": Transformers,
}
