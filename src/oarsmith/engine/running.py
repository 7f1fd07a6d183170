"""What turns a model's backend into a runner. No PyTorch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oarsmith.engine.backend import Backend
from oarsmith.engine.free_memory import free_memory
from oarsmith.engine.native_model import NativeModel
from oarsmith.engine.options import Sizes, Speculation
from oarsmith.engine.pages import PagePool
from oarsmith.engine.runner import Runner
from oarsmith.engine.scheduler import Scheduler
from oarsmith.models.caching import CacheRules

if TYPE_CHECKING:
    from oarsmith.engine.speculation import Drafter


def native_runner(native: NativeModel, sizes: Sizes, speculation: Speculation) -> Runner:
    """A runner of the compiled step."""
    form = sizes.cache_form(native.program.own_form)
    page = native.program.page_bytes(sizes.block_size, form=form)
    num_pages = sizes.pages(native.facts.max_positions, page, free_memory())
    backend = native.backend(sizes.batch_size, num_pages, sizes.block_size, form=form)
    return make_runner(backend, native.facts.rules, num_pages, sizes, ngram_drafter(speculation))


def ngram_drafter(speculation: Speculation) -> Drafter | None:
    """Who guesses by looking back, if that is wished."""
    if speculation.by is None:
        return None
    from oarsmith.engine.speculation import NgramDrafter

    return NgramDrafter(speculation.ngram_min, speculation.ngram_max)


def make_runner(
    backend: Backend, rules: CacheRules, num_pages: int, sizes: Sizes, drafter: Drafter | None, *, gpu: bool = False
) -> Runner:
    """A runner with its scheduler and pages."""
    scheduler = Scheduler(
        PagePool(num_pages, sizes.block_size),
        rules,
        max_running=sizes.batch_size,
        max_step_tokens=sizes.step_tokens(gpu),
        prefixes=sizes.prefix_caching,
        followed=drafter is not None and bool(drafter.backends),
    )
    return Runner(backend, scheduler, drafter)
