"""The engines that ``oarsmith bench`` measures: each answers requests and notes when every token came.

Nothing is imported at the top that one of them would have to pay for in the place of another.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """What a measuring process is to do, as plain values.

    Attributes:
        system: which engine.
        config: the values of the configuration.
        model: as the engine reads it: a directory, or a GGUF file.
        dtype: the format to compute in, where the engine does not decide.
        requests: (ids of the prompt, tokens of the answer) each.
        started: ``time.time()`` when the process was started.
    """

    system: str
    config: dict[str, Any]
    model: str
    dtype: str
    requests: list[tuple[list[int], int]]
    started: float = 0.0

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(len(ids) + size for ids, size in self.requests)


@dataclass
class Answer:
    """When a request began, and when which token of its answer came (seconds of ``time.perf_counter``)."""

    begin: float
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, token: int) -> None:
        """A token that has just come."""
        self.ids.append(token)
        self.times.append(time.perf_counter())


Request = tuple[list[int], int]


class System(Protocol):
    """An engine with a model."""

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        """Greedy answers of the lengths asked for, so many requests at a time, in the order of the requests."""

    def versions(self) -> dict[str, str]:
        """What the numbers depend on."""


class Oarsmith:
    """The public engine, with whatever it uses inside."""

    def __init__(self, task: Task) -> None:
        from oarsmith.config.bench import BenchConfig
        from oarsmith.engine import Sampling
        from oarsmith.jobs.ask import answering, open_engine

        config = BenchConfig.model_validate(task.config)
        self._said = _Said()
        # For as long as the process lives.
        self._context = answering(config)
        self._context.__enter__()
        self._engine = open_engine(config, config.concurrency)
        self._sampling = Sampling
        self._num_threads = config.num_threads

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        engine, waiting = self._engine, list(enumerate(requests))[::-1]
        # Of the same prompt in an earlier phase nothing is to be known any more.
        engine.forget()
        answers: dict[str, Answer] = {}
        num_open = 0
        while waiting or num_open:
            while waiting and num_open < concurrency:
                number, (ids, size) = waiting.pop()
                answers[str(number)] = Answer(time.perf_counter())
                engine.add(ids, self._sampling(max_new_tokens=size, ignore_eos=True), id=str(number))
                num_open += 1
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                if output.choice is not None:
                    answers[output.id].add(output.choice.token)
                num_open -= output.completion is not None
        return [answers[str(number)] for number in range(len(requests))]

    def versions(self) -> dict[str, str]:
        from oarsmith._version import __version__

        facts = {"oarsmith": __version__, "computes with": "; ".join(self._said.lines)}
        torch = sys.modules.get("torch")
        threads = self._num_threads or usable_cpus()
        if torch is not None:
            facts["torch"], threads = torch.__version__, torch.get_num_threads()
        return {**facts, "threads": str(threads)}


class _Said(logging.Handler):
    """What the engine logs of itself: which implementation serves, and why."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("oarsmith.engine")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Transformers:
    """``generate`` on padded batches: a batch begins when the one before has ended."""

    def __init__(self, task: Task) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if task.config["num_threads"] is not None:
            torch.set_num_threads(task.config["num_threads"])
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[task.dtype]
        device = task.config["device"]
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
        self._model: Any = model.to(self._device).eval()
        settings = self._model.generation_config
        # Greedy and never ending, whatever the model brings.
        settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=None)
        settings.eos_token_id, settings.pad_token_id = None, 0

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        return [
            answer
            for start in range(0, len(requests), concurrency)
            for answer in self._batch(requests[start : start + concurrency])
        ]

    def _batch(self, requests: Sequence[Request]) -> list[Answer]:
        import torch
        from transformers.generation.streamers import BaseStreamer

        answers = [Answer(time.perf_counter()) for _ in requests]
        longest = max(len(ids) for ids, _ in requests)

        class Clock(BaseStreamer):
            """Notes what comes; the first thing that comes are the prompts."""

            prompts = True

            def put(self, value: Any) -> None:
                if self.prompts:
                    self.prompts = False
                    return
                for (_, size), answer, token in zip(requests, answers, value.flatten().tolist(), strict=True):
                    if len(answer.ids) < size:
                        answer.add(token)

            def end(self) -> None:
                return

        ids = [[0] * (longest - len(ids)) + ids for ids, _ in requests]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in requests]
        with torch.inference_mode():
            self._model.generate(
                torch.tensor(ids, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=max(size for _, size in requests),
                streamer=Clock(),
            )
        return answers

    def versions(self) -> dict[str, str]:
        import torch
        import transformers

        threads = str(torch.get_num_threads())
        return {"transformers": transformers.__version__, "torch": torch.__version__, "threads": threads}


class LlamaCpp:
    """llama-cpp-python, which answers one request after another."""

    def __init__(self, task: Task) -> None:
        import llama_cpp

        self._threads = task.config["num_threads"] or usable_cpus()
        self._version = llama_cpp.__version__
        self._model: Any = llama_cpp.Llama(
            task.model,
            n_ctx=task.context + 8,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            n_gpu_layers=0 if task.config["device"] == "cpu" else -1,
            verbose=False,
        )

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        answers = []
        for ids, size in requests:
            answer = Answer(time.perf_counter())
            self._model.reset()
            for token in self._model.generate(ids, temp=0.0, repeat_penalty=1.0):
                answer.add(int(token))
                if len(answer.ids) == size:
                    break
            answers.append(answer)
        return answers

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": self._version, "threads": str(self._threads)}


class OpenVino:
    """openvino-genai's continuous batching."""

    def __init__(self, task: Task) -> None:
        import openvino_genai

        self._library: Any = openvino_genai
        threads = task.config["num_threads"]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = task.config["concurrency"]
        properties = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        if task.dtype != "fp16":
            properties["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[task.dtype]
        self._threads = threads or usable_cpus()
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(task.model, scheduler, "CPU", properties)
        self._num_asked = 0

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        import numpy
        import openvino

        waiting, running, answers = list(requests)[::-1], list[tuple[Any, Answer]](), list[Answer]()
        while waiting or running:
            while waiting and len(running) < concurrency:
                ids, size = waiting.pop()
                config = self._library.GenerationConfig(max_new_tokens=size, ignore_eos=True, do_sample=False)
                answers.append(Answer(time.perf_counter()))
                prompt = openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
                running.append((self._pipeline.add_request(self._num_asked, prompt, config), answers[-1]))
                self._num_asked += 1
            self._pipeline.step()
            for handle, answer in running:
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            answer.add(int(token))
            finished = self._library.GenerationStatus.FINISHED
            running = [(handle, answer) for handle, answer in running if handle.get_status() != finished]
        return answers

    def versions(self) -> dict[str, str]:
        return {"openvino-genai": self._library.__version__, "threads": str(self._threads)}


def usable_cpus() -> int:
    """Threads where nobody says how many: ``$OMP_NUM_THREADS``, else the CPUs that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


SYSTEMS: dict[str, Callable[[Task], System]] = {
    "oarsmith": Oarsmith,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino-genai": OpenVino,
}
PACKAGES = {
    "transformers": ("transformers", "transformers"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "openvino-genai": ("openvino_genai", "openvino-genai"),
}
"""Of each peer: the module it is, and the package that brings it."""
