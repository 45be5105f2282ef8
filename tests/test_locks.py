"""Who may run the model when, under which edits, and what an interrupt leaves behind: nothing."""

import asyncio
import contextvars
import copy
import itertools
import sys
import threading
import time
from functools import partial

import pytest
import torch
from interrupted import (
    IDS,
    delays,
    edit,
    in_time,
    interrupted,
    logits,
    places,
    references,
    remains,
    signalled,
    traced,
)

from qsae_kit.lm.edits import applied
from qsae_kit.lm.locks import Hold

A, B, OWN = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post"
SIZES = {A: 3.0, B: 5.0, OWN: 7.0}
NEVER = 20.0
"""Seconds after which a test counts as stuck."""
A_WHILE = 0.02
"""Seconds in which whoever need not wait has begun."""


@pytest.fixture(autouse=True)
def _not_stuck():
    with in_time(NEVER):
        yield


def at(*sites):
    return [edit(SIZES[site], site) for site in sites]


@pytest.fixture(scope="module")
def expected(lm):
    """Logits under the edits of some sites, from a copy of the HF model and hooks of torch
    alone.
    """
    hf = copy.deepcopy(lm.hf)

    @torch.no_grad()
    def under(*sites):
        def hook(size, _m, _a, out):
            added = torch.where(torch.arange(out.shape[-1]) < 20, size, 0.0)
            return torch.cat([out[:, :1], out[:, 1:] + added], 1)

        layers = [(hf.model.layers[int(site.split(".")[1])], SIZES[site]) for site in sites]
        handles = [layer.register_forward_hook(partial(hook, size)) for layer, size in layers]
        out = hf(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        for handle in handles:
            handle.remove()
        return out

    every = [sites for n in range(4) for sites in itertools.combinations(SIZES, n)]
    assert len({tuple(under(*sites).flatten().tolist()) for sites in every}) == len(every)
    return {sites: under(*sites) for sites in every}


# --- a copy of a context, made at one stage of two nested `with` and used at another

STAGES = ((), (A,), (A, B), (A,), ())
"""The edits that are on at each stage: before, inside the first `with`, inside both, after the
second, after both.
"""
PAIRS = [(made, used) for made in range(3) for used in range(1, 5) if made <= used]


def left_of(made, stage):
    """The edits that a context copied at one stage is still in at another."""
    return tuple(site for site in STAGES[made] if site in STAGES[stage])


def answer(lm, own):
    """Logits, under an edit of its own where that is wanted."""
    if not own:
        return logits(lm)
    with applied(lm, at(OWN)):
        return logits(lm)


def staged(lm, look):
    """Calls `look` at each stage, and looks itself that the answers are those of the stage's
    edits.
    """
    look(0)
    with applied(lm, at(A)):
        look(1)
        with applied(lm, at(B)):
            look(2)
        look(3)
    look(4)
    assert not lm.lock.held
    assert not remains(lm)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("made", "used"), PAIRS)
def test_a_copy_in_a_thread_waits_until_nobody_is_further_inside(lm, expected, made, used, own):
    free = next(stage for stage in range(used, 5) if left_of(made, stage) == STAGES[stage])
    copies, out, at_work = [], [], threading.Event()

    def work():
        at_work.set()
        out.append(answer(lm, own))

    def look(stage):
        if stage == made:
            copies.append(contextvars.copy_context())
        if stage == used:
            copies.append(threading.Thread(target=copies[0].run, args=(work,), daemon=True))
            copies[1].start()
            at_work.wait()
        if used <= stage < free:
            copies[1].join(A_WHILE)
            assert copies[1].is_alive()
        if stage == free:
            copies[1].join()
            assert torch.equal(out[0], expected[left_of(made, stage) + (OWN,) * own])
        assert torch.equal(logits(lm), expected[STAGES[stage]])

    staged(lm, look)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("made", "used"), PAIRS)
def test_a_copy_in_the_same_thread_is_refused_where_waiting_would_not_end(
    lm, expected, made, used, own
):
    copies = []

    def look(stage):
        if stage == made:
            copies.append(contextvars.copy_context())
        if stage == used and left_of(made, stage) == STAGES[stage]:
            out = copies[0].run(answer, lm, own)
            assert torch.equal(out, expected[left_of(made, stage) + (OWN,) * own])
        elif stage == used:
            with pytest.raises(
                RuntimeError, match=r"held in this very thread.*another task.*to_thread"
            ):
                copies[0].run(answer, lm, own)
            assert not copies[0].run(lm.lock.acquire, blocking=False)
        assert torch.equal(logits(lm), expected[STAGES[stage]])

    staged(lm, look)


# --- several at once


def in_threads(works, copied):
    """Runs all works at once, each in a thread, in a copy of the context or not; what they
    return.
    """
    out = {}

    def run(i):
        out[i] = works[i]()

    threads = []
    for i in range(len(works)):
        args = (contextvars.copy_context().run, (run, i)) if copied else (run, (i,))
        threads.append(threading.Thread(target=args[0], args=args[1]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [out[i] for i in range(len(works))]


@pytest.mark.parametrize("held", [(), (A,), (A, B)])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_copies_that_run_at_once_do_not_see_each_others_edits(lm, expected, held, n):
    def work(own):
        return [answer(lm, own) for _ in range(6)]

    with applied(lm, at(*held)) as inside:
        assert inside is lm
        found = in_threads([partial(work, i % 2) for i in range(n)], copied=True)
        assert torch.equal(logits(lm), expected[held])
    for i, answers in enumerate(found):
        assert all(torch.equal(out, expected[held + (OWN,) * (i % 2)]) for out in answers)


@pytest.mark.parametrize("n", [2, 4])
def test_threads_of_their_own_wait_for_each_other(lm, expected, n):
    found = in_threads([partial(answer, lm, i % 2) for i in range(n)], copied=False)
    assert all(torch.equal(out, expected[(OWN,) * (i % 2)]) for i, out in enumerate(found))


def test_leaving_waits_for_a_copy_that_is_at_work(lm, expected):
    begun, out = threading.Event(), []

    def work():
        with lm.lock:
            begun.set()
            time.sleep(A_WHILE)
            out.append(logits(lm))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: None,))
    with applied(lm, at(A)):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
        begun.wait()
    assert out
    assert torch.equal(out[0], expected[A,])
    assert torch.equal(logits(lm), expected[()])
    thread.join()


# --- tasks of one event loop


def test_a_task_that_would_wait_for_another_is_refused_and_can_use_a_thread(lm, expected):
    async def steered(inside, go):
        with applied(lm, at(A)):
            inside.set()
            await go.wait()
            return logits(lm)

    async def both():
        inside, go = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(steered(inside, go))
        await inside.wait()
        for call in (
            lambda: lm.generate("Hi"),
            lambda: next(lm.hooks().__enter__()),
            partial(logits, lm),
        ):
            with pytest.raises(RuntimeError, match="very thread"):
                call()
        other = asyncio.create_task(asyncio.to_thread(logits, lm))
        await asyncio.sleep(A_WHILE)
        assert not other.done()
        go.set()
        return await first, await other

    steered_out, other_out = asyncio.run(both())
    assert torch.equal(steered_out, expected[A,])
    assert torch.equal(other_out, expected[()])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("way", ["task", "to_thread", "gather"])
@pytest.mark.parametrize("when", ["inside", "after"])
def test_tasks_made_inside(lm, expected, way, when, own):
    async def work(go):
        await go.wait()
        if way == "task":
            return [answer(lm, own)]
        n = 3 if way == "gather" else 1
        return await asyncio.gather(*(asyncio.to_thread(answer, lm, own) for _ in range(n)))

    async def main():
        go = asyncio.Event()
        with applied(lm, at(A)):
            task = asyncio.create_task(work(go))
            if when == "inside":
                go.set()
                await task
            assert torch.equal(logits(lm), expected[A,])
        go.set()
        return await task

    live = (A,) if when == "inside" else ()
    assert all(torch.equal(out, expected[live + (OWN,) * own]) for out in asyncio.run(main()))


@pytest.mark.parametrize("outer", [(), (B,)])
def test_a_with_that_is_left_before_one_begun_inside_it_says_so_and_is_gone(lm, expected, outer):
    async def begun_inside(inside, go):
        with applied(lm, at(OWN)):
            inside.set()
            await go.wait()
            return logits(lm)

    async def main():
        inside, go = asyncio.Event(), asyncio.Event()
        tasks = []

        async def leave_too_early():
            with applied(lm, at(A)):
                tasks.append(asyncio.create_task(begun_inside(inside, go)))
                await inside.wait()
                with pytest.raises(RuntimeError, match="very thread"):
                    logits(lm)

        with pytest.raises(
            RuntimeError, match=r"left while another task.*leave the inner one first"
        ):
            await leave_too_early()
        with pytest.raises(RuntimeError, match="very thread"):
            logits(lm)
        go.set()
        return await tasks[0], logits(lm)

    with applied(lm, at(*outer)):
        within, after = asyncio.run(main())
        assert torch.equal(logits(lm), expected[outer])
    # asyncio.run copies the context, so that `outer` is around everything
    assert torch.equal(within, expected[tuple(sorted((*outer, OWN)))])
    assert torch.equal(after, expected[outer])
    assert torch.equal(logits(lm), expected[()])


def test_an_error_inside_is_not_hidden_by_one_of_leaving(lm, expected):
    generator = paused(lm, B)

    def fail():
        with applied(lm, at(A)):
            next(generator)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert "leave the inner one first" in caught.value.__notes__[0]
    generator.close()
    assert torch.equal(logits(lm), expected[()])


# --- generators


def paused(lm, *sites):
    """Answers under edits, again and again."""
    with applied(lm, at(*sites)):
        while True:
            yield logits(lm)


@pytest.mark.parametrize("end", ["closed", "dropped", "closed in a thread", "thrown into"])
def test_a_paused_generator_holds_the_model_in_its_own_context(lm, expected, end):
    generator = paused(lm, A)
    assert torch.equal(next(generator), expected[A,])
    assert torch.equal(logits(lm), expected[A,])
    with pytest.raises(RuntimeError, match="paused generator"):
        contextvars.Context().run(logits, lm)
    if end == "closed":
        generator.close()
    elif end == "closed in a thread":
        in_threads([generator.close], copied=False)
    elif end == "thrown into":
        with pytest.raises(KeyboardInterrupt):
            generator.throw(KeyboardInterrupt)
    del generator
    assert not remains(lm)
    assert torch.equal(logits(lm), expected[()])


def test_generators_that_are_closed_in_the_wrong_order(lm, expected):
    first, second = paused(lm, A), paused(lm, B)
    next(first)
    assert torch.equal(next(second), expected[A, B])
    with pytest.raises(RuntimeError, match="its edits were taken away all the same"):
        first.close()
    assert torch.equal(next(second), expected[B,])
    assert torch.equal(logits(lm), expected[B,])
    second.close()
    assert torch.equal(logits(lm), expected[()])


# --- streams

SHORT = {"chat": False, "max_new_tokens": 6}
LONG = {"chat": False, "max_new_tokens": 60, "do_sample": True, "seed": 0}


@pytest.mark.parametrize("sites", [(), (A,), (A, B)])
def test_a_stream_is_under_the_edits_around_it_and_others_wait(lm, expected, sites):
    with applied(lm, at(*sites)):
        whole = lm.generate("How do I", **SHORT).text[0]
        parts = lm.stream("How do I", **SHORT)
        text = next(parts)[0]
        assert torch.equal(logits(lm), expected[sites])  # after the worker's last token
        assert text + "".join(part[0] for part in parts) == whole
    assert torch.equal(logits(lm), expected[()])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("end", ["closed", "dropped", "thrown into"])
def test_a_stream_that_is_given_up_stops(lm, expected, inside, end):
    before = threading.active_count()
    whole = len(lm.generate("How do I", **LONG).tokens[0])
    passes = []
    with applied(lm, at(A) if inside else []), lm.hooks([(B, lambda x, hook: passes.append(0))]):
        parts = lm.stream("How do I", **LONG)
        next(parts)
        if end == "closed":
            parts.close()
        elif end == "thrown into":
            with pytest.raises(KeyboardInterrupt):
                parts.throw(KeyboardInterrupt)
        del parts
        assert threading.active_count() == before
        assert len(passes) < whole / 2
        assert torch.equal(logits(lm), expected[(A,) if inside else ()])


def test_a_stream_whose_end_is_interrupted_stops(lm, expected, monkeypatch):
    def interrupt(_event):
        raise KeyboardInterrupt

    whole = len(lm.generate("How do I", **LONG).tokens[0])
    passes = []
    with lm.hooks([(B, lambda x, hook: passes.append(0))]):
        parts = lm.stream("How do I", **LONG)
        next(parts)
        monkeypatch.setattr(threading.Event, "set", interrupt)
        with pytest.raises(KeyboardInterrupt):
            parts.close()
        monkeypatch.undo()
    assert len(passes) < whole / 2
    assert torch.equal(logits(lm), expected[()])


def test_leaving_waits_for_a_stream(lm, expected):
    with applied(lm, at(A)):
        whole = lm.generate("How do I", **SHORT).text[0]
        parts = lm.stream("How do I", **SHORT)
        text = next(parts)[0]
    assert torch.equal(logits(lm), expected[()])
    assert text + "".join(part[0] for part in parts) == whole


# --- the lock by itself


def test_acquire_and_release(lm):
    with pytest.raises(RuntimeError, match="does not hold the lock by `acquire`"):
        lm.lock.release()
    assert lm.lock.acquire()
    assert lm.lock.acquire(blocking=False)
    with applied(lm, []), pytest.raises(RuntimeError, match="call `release` where"):
        lm.lock.release()
    assert in_threads([partial(lm.lock.acquire, blocking=False)], copied=False) == [False]
    lm.lock.release()
    assert lm.lock.held
    lm.lock.release()
    assert not lm.lock.held


def test_an_attempt_says_whether_it_is_inside(lm):
    def attempt():
        with lm.lock.attempt() as inside:
            return inside, lm.lock.held

    assert attempt() == (True, True)
    with lm.lock:
        assert attempt() == (True, True)
        assert in_threads([attempt], copied=False) == [(False, False)]
        assert contextvars.Context().run(attempt) == (False, False)
    assert not lm.lock.held


def test_an_entry_that_nobody_can_leave_is_taken_away(lm, expected):
    entry = applied(lm, at(A))
    entry.__enter__()
    assert torch.equal(logits(lm), expected[A,])
    del entry
    assert not remains(lm)
    assert torch.equal(logits(lm), expected[()])


def test_an_entry_whose_set_up_fails_leaves_nothing(lm, expected):
    entry = lm.hooks([(A, lambda x, hook: 0 * x), ("nowhere", lambda x, hook: x)])
    with pytest.raises(ValueError, match="no hook point 'nowhere'"):
        entry.__enter__()
    assert not remains(lm)
    assert torch.equal(logits(lm), expected[()])
    del entry


def test_nobody_enters_what_is_being_left(lm, expected):
    copies, seen = [], []
    begun = threading.Event()

    def work(outer):
        with lm.lock:
            begun.set()
            while not outer.closing:
                time.sleep(A_WHILE)
            seen.append((lm.lock.held, copies[0].run(lambda: lm.lock.held), logits(lm)))

    with applied(lm, at(A)):
        copies.append(contextvars.copy_context())
        threading.Thread(target=contextvars.copy_context().run, args=(work, lm.lock.here)).start()
        begun.wait()
    held, other_held, out = seen[0]
    assert held
    assert not other_held
    assert torch.equal(out, expected[A,])


def test_what_is_closed_just_before_is_not_entered(lm, expected, monkeypatch):
    take, outers = Hold.take, []

    def late(hold, outer):
        outer.closing = not outers
        outers.append(outer)
        return take(hold, outer)

    with applied(lm, at(A)):
        monkeypatch.setattr(Hold, "take", late)
        with pytest.raises(RuntimeError, match="very thread"):
            logits(lm)
        monkeypatch.undo()
        assert outers[0].inner is None
        outers[0].closing = False
        assert torch.equal(logits(lm), expected[A,])


def test_leaving_that_was_interrupted_while_it_waited_is_done_by_whom_it_waited_for(lm, expected):
    begun, go, out = threading.Event(), threading.Event(), []

    def work():
        with lm.lock:
            begun.set()
            go.wait()
            out.append(logits(lm))

    def leave():
        with applied(lm, at(A)):
            threads.append(threading.Thread(target=contextvars.copy_context().run, args=(work,)))
            threads[0].start()
            begun.wait()

    threads = []
    assert isinstance(signalled(leave, 2 * A_WHILE, "SIGINT"), KeyboardInterrupt)
    assert remains(lm)
    go.set()
    threads[0].join()
    assert not remains(lm)
    assert torch.equal(out[0], expected[A,])
    assert torch.equal(logits(lm), expected[()])


def test_a_pass_inside_a_pass_is_refused(lm, expected):
    def call(*_args, **_kwargs):
        logits(lm)

    with pytest.raises(
        RuntimeError, match=r"from inside one of its own passes.*call it after the pass"
    ):
        lm.run_with_hooks(IDS, fwd_hooks=[(A, call)])
    with pytest.raises(RuntimeError, match="on_step"):
        lm.generate("Hi", on_step=call, **SHORT)
    assert torch.equal(logits(lm), expected[()])


# --- what TransformerLens's `hooks` does, and what others put on the model, stay as they are


def test_hooks_by_name_and_function_in_both_directions_and_in_order(lm):
    seen = []

    def note(text):
        return lambda x, hook: seen.append((text, hook.name, lm.context_level))

    lm.add_hook(A, note("user"))
    with lm.hooks(
        [(A, note("outer")), (lambda name: name in (A, B), note("both"))], [(B, note("back"))]
    ):
        lm.add_hook(B, note("kept"))
        with lm.hooks([(A, note("inner"))]):
            assert [handle.context_level for handle in lm.hook_dict[A].fwd_hooks] == [None, 1, 1, 2]
            lm(IDS, return_type="loss").backward()
    lm.hf.zero_grad()
    forth = [
        ("user", A, 2),
        ("outer", A, 2),
        ("both", A, 2),
        ("inner", A, 2),
        ("both", B, 2),
        ("kept", B, 2),
    ]
    assert seen == [*forth, ("back", B, 2)]
    assert lm.context_level == 0
    assert list(lm.list_hooks()) == [A, B]
    seen.clear()
    logits(lm)
    assert [text for text, *_ in seen] == ["user", "kept"]
    lm.reset_hooks()
    hooks = [(A, note("x")), ("nowhere", note("y"))]
    with pytest.raises(ValueError, match="no hook point 'nowhere'"), lm.hooks(hooks):
        pass
    assert not remains(lm)


def test_hooks_that_are_to_stay_do(lm, expected):
    add = torch.where(torch.arange(lm.d_model) < 20, SIZES[A], 0.0)
    kept = (A, lambda x, hook: torch.cat([x[:, :1], x[:, 1:] + add], 1))
    with lm.hooks([kept], reset_hooks_end=False):
        lm.hook_dict[A].ctx["note"] = 1
    with applied(lm, at(B)):
        assert torch.equal(logits(lm), expected[A, B])
    assert torch.equal(logits(lm), expected[A,])
    with lm.hooks([], clear_contexts=True):
        assert lm.hook_dict[A].ctx
    assert not lm.hook_dict[A].ctx
    lm.reset_hooks()
    assert torch.equal(logits(lm), expected[()])


def test_another_librarys_forward_of_a_layer_survives(lm, expected):
    known = references(lm)
    calls = []

    def wrapped(forward, i):
        def call(*args, **kwargs):
            calls.append(i)
            return forward(*args, **kwargs)

        return call

    layers = lm.hf.model.layers
    wrappers = [wrapped(layer.forward, i) for i, layer in enumerate(layers)]
    try:
        for layer, wrapper in zip(layers[:-1], wrappers, strict=False):
            layer.forward = wrapper
        assert torch.equal(lm(IDS, start_at_layer=4, residual=known.residual), known.clean)
        assert calls == [4]
        assert [layer.__dict__.get("forward") for layer in layers] == [*wrappers[:-1], None]
        assert torch.equal(logits(lm), expected[()])
        assert calls == [4, 0, 1, 2, 3, 4]
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


# --- interrupts

EVENTS_A_PLACE, SIGNALS_A_PLACE = 14, 6
LATEST = 0.01
"""Seconds in which a signal is sent; what it interrupts is repeated meanwhile."""
BY_STACK = "stacked"
"""Where frames of contextlib hold the entry, so that a traceback does too until it is collected."""


@pytest.fixture
def quiet(monkeypatch):
    """An interrupt of what Python calls by itself can only be printed."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


PLACES = (
    "enter and leave",
    "forward",
    "nested",
    BY_STACK,
    "generate",
    "stream",
    "closed",
    "later",
    "cached",
    "both ways",
)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_no_edit_and_no_shut_lock(lm, quiet, place):
    known = references(lm)
    act = places(lm, known)[place]
    n = traced(act)[1]
    stacked = place == BY_STACK
    tries = []
    for i in range(EVENTS_A_PLACE):
        event = 1 + i * n // EVENTS_A_PLACE
        tries.append((event, lambda event=event: traced(act, event)[0]))
    for i, delay in enumerate(delays(LATEST, SIGNALS_A_PLACE, 0)):
        tries.append((delay, partial(signalled, act, delay, ("timer", "SIGINT")[i // 2 % 2])))
    found = 0
    for i, (when, interrupt) in enumerate(tries):
        left = interrupted(lm, known, interrupt, keep=i % 2 == 0 and not stacked, collect=stacked)
        found += left is not None
        assert left is None or not any(left[1:]), (when, left)
    assert found > 0.8 * len(tries)  # some come too late


@pytest.mark.parametrize(
    ("method", "n"),
    [("register_forward_hook", 1), ("register_forward_hook", 2), ("register_forward_pre_hook", 1)],
)
def test_a_hook_whose_handle_nobody_got_is_taken_away(lm, expected, monkeypatch, method, n):
    register, calls = getattr(torch.nn.Module, method), []

    def interrupt(*args, **kwargs):
        calls.append(register(*args, **kwargs))
        if len(calls) == n:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(torch.nn.Module, method, interrupt)
    with pytest.raises(KeyboardInterrupt), applied(lm, at(A)):
        logits(lm)
    monkeypatch.undo()
    assert len(calls) == n
    assert not remains(lm)
    assert torch.equal(logits(lm), expected[()])


def test_the_places_are_all_of_them(lm):
    assert set(PLACES) == set(places(lm, references(lm)))
