"""Interrupts at every place of what enters, runs and leaves the model, and what they leave
behind.
"""

import contextlib
import contextvars
import gc
import inspect
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

import qsae_kit.lm.edits
import qsae_kit.lm.hooked
import qsae_kit.lm.locks
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM

OURS = (qsae_kit.lm.locks, qsae_kit.lm.hooked, qsae_kit.lm.edits)
FILES = {inspect.getfile(each) for each in (*OURS, contextlib, HookPoint, HookedRootModule)}
EVENTS = ("call", "line", "return")
SITE, LAYER = "blocks.3.hook_resid_post", 4
IDS = torch.tensor([[5, 6, 7]])
IN_TIME = 1.0
"""Seconds within which the model must answer after an interrupt."""
YOUNG = 1
"""The garbage collector's generations up to this one hold what a try has made."""
SHORTEST = 1e-6
"""Seconds; a timer of 0 would never ring."""
STUCK = 5.0
"""Seconds after which what is interrupted counts as stuck."""


def edit(size: float = 5.0, site: str = SITE) -> Edit:
    """Adds a number to a few dimensions."""
    return Edit(site, lambda x: torch.where(torch.arange(x.shape[-1]) < 20, size, 0.0), (1, 2))


@torch.no_grad()
def logits(lm: HookedLM) -> torch.Tensor:
    out = lm(IDS)
    assert out is not None
    return out


class References(NamedTuple):
    """What a model that was never interrupted gives without and with the edit."""

    clean: torch.Tensor
    edited: torch.Tensor
    residual: torch.Tensor


def references(lm: HookedLM) -> References:
    clean = logits(lm)
    with applied(lm, [edit()]):
        edited = logits(lm)
    residual = lm.run_with_cache(IDS, names_filter=f"blocks.{LAYER - 1}.hook_resid_post")[1]
    return References(clean, edited, next(iter(residual.values())))


# --- the places


def places(lm: HookedLM, known: References) -> dict[str, Callable[[], object]]:
    """What is interrupted, each under the name of its place."""
    short = {"chat": False, "max_new_tokens": 2}

    def enter_and_leave() -> None:
        with applied(lm, [edit()]):
            pass

    def forward() -> None:
        with applied(lm, [edit()]):
            lm(IDS)

    def nested() -> None:
        with applied(lm, [edit()]), lm.lock, applied(lm, [edit(1.0, "blocks.1.hook_mlp_out")]):
            pass

    def stacked() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(applied(lm, [edit()]))
            stack.enter_context(applied(lm, [edit(1.0)]))

    def generate() -> None:
        with applied(lm, [edit()]):
            lm.generate("How", **short)

    def stream() -> None:
        with applied(lm, [edit()]):
            for _ in lm.stream("How", **short):
                pass

    def closed() -> None:
        parts = lm.stream("How do I", chat=False, max_new_tokens=40)
        next(parts)
        parts.close()

    def later() -> None:
        with applied(lm, [edit(5.0, f"blocks.{LAYER}.hook_resid_post")]):
            lm(IDS, start_at_layer=LAYER, residual=known.residual)

    def cached() -> None:
        lm.run_with_cache(IDS, names_filter=[SITE], return_type=None)

    def both_ways() -> None:
        with lm.hooks([(SITE, lambda x, hook: None)], [(SITE, lambda x, hook: None)]):
            pass

    acts = (
        enter_and_leave,
        forward,
        nested,
        stacked,
        generate,
        stream,
        closed,
        later,
        cached,
        both_ways,
    )
    return {act.__name__.replace("_", " "): act for act in acts}


# --- the interrupts


class Late(Exception):
    """The model did not answer in time."""


def traced(act: Callable[[], object], n: int = 0) -> tuple[BaseException | None, int]:
    """Runs `act`, with a KeyboardInterrupt at its n-th event (0: none) in the files; the error, and
    how many there were.
    """
    seen = 0

    def look(frame, event, arg):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return look

    def choose(frame, event, arg):
        return look(frame, event, arg) if frame.f_code.co_filename in FILES else None

    error: BaseException | None = None
    before = sys.gettrace()
    with in_time(STUCK):
        sys.settrace(choose)
        try:
            act()
        except KeyboardInterrupt as caught:
            error = caught
        finally:
            sys.settrace(before)
    return error, seen


def signalled(act: Callable[[], object], seconds: float, by: str) -> BaseException | None:
    """Runs `act` again and again until a real signal comes, after so many seconds.

    by: "timer", whose SIGALRM raises KeyboardInterrupt, or "SIGINT", Ctrl-C.
    """

    armed = [True]

    def raise_it(number: int, _frame: object) -> None:
        if armed and (by == "timer" or number == signal.SIGINT):
            armed.clear()
            raise KeyboardInterrupt
        if number == signal.SIGALRM:
            raise Late

    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    handlers = {s: signal.signal(s, raise_it) for s in (signal.SIGALRM, signal.SIGINT)}
    error: BaseException | None = None
    try:
        first = max(seconds, SHORTEST) if by == "timer" else STUCK
        signal.setitimer(signal.ITIMER_REAL, first, STUCK)
        if by == "SIGINT":
            sender.start()
        end = time.perf_counter() + seconds + IN_TIME
        while armed and time.perf_counter() < end:
            act()
        armed.clear()
    except (KeyboardInterrupt, RuntimeError) as caught:  # threading makes some into RuntimeErrors
        error = caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if sender.ident is not None:
            sender.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return error


# --- what is left behind


@contextlib.contextmanager
def in_time(seconds: float = IN_TIME) -> Iterator[None]:
    """Late where the block takes longer; in the main thread."""

    def raise_it(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def remains(lm: HookedLM) -> bool:
    """Whether a hook, or a layer's replaced `forward`, is on the model."""
    points = any(
        p._forward_hooks or p._backward_hooks or p.fwd_hooks or p.bwd_hooks
        for p in lm.hook_points()
    )
    modules = any(m._forward_hooks or m._forward_pre_hooks for m in lm.hf.modules())
    return points or modules or any("forward" in layer.__dict__ for layer in lm.hf.model.layers)


class Left(NamedTuple):
    """What an interrupt left behind."""

    at_once: bool
    """A hook, before the model was called again."""
    shut: bool
    """The lock: the model did not answer in time."""
    wrong: bool
    """An answer that is not the clean model's, or not the edited one's under the edit."""
    after: bool
    """A hook, after the model was called again."""


def left_by(lm: HookedLM, known: References) -> Left:
    at_once, wrong = remains(lm), False
    try:
        with in_time():
            wrong = not torch.equal(logits(lm), known.clean)
            after = remains(lm)
            with applied(lm, [edit()]):
                wrong = wrong or not torch.equal(logits(lm), known.edited)
            wrong = wrong or not torch.equal(logits(lm), known.clean)
    except Late:
        return Left(at_once, True, wrong, True)
    except (KeyError, AttributeError, AssertionError, RuntimeError):
        return Left(at_once, False, True, True)
    return Left(at_once, False, wrong, after)


def interrupted(
    lm: HookedLM,
    known: References,
    interrupt: Callable[[], BaseException | None],
    keep: bool = False,
    collect: bool = False,
) -> Left | None:
    """Interrupts in a context of its own and looks what was left; None where the interrupt came too
    late.

    keep: the traceback, as IPython does in `sys.last_value`.
    collect: garbage, before looking: ExitStack makes cycles with a traceback.
    """

    def run() -> Left | None:
        try:
            error = interrupt()
        except Late:
            return Left(True, True, False, True)
        except Exception:  # the model failed instead of being interrupted
            return Left(True, False, True, True)
        if error is None:
            return None
        kept = error if keep else None
        del error
        if collect:
            gc.collect(YOUNG)
        left = left_by(lm, known)
        del kept
        return left

    return contextvars.copy_context().run(run)


def cleaned(lm: HookedLM) -> HookedLM:
    """A new HookedLM on the same HF model, freed from whatever was left on it."""
    for module in lm.hf.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module.__dict__.pop("forward", None)
    return HookedLM(lm.hf, lm.tokenizer, lm.model_name)


def delays(seconds: float, n: int, seed: int) -> list[float]:
    """Random moments within a duration."""
    draw = random.Random(seed)
    return [draw.uniform(0, seconds) for _ in range(n)]
