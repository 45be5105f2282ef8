"""A lock that belongs to contexts: a stack of holds that know their makers and how to undo them.

No mutex guards the stack, for an interrupt could leave that one shut: a place is taken by
`dict.setdefault`, which is atomic, and only its owner gives it back. A weak reference tells of an
owner that was interrupted.
"""

import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import ref

T = TypeVar("T")
LOOK_AGAIN = 0.05
"""Seconds after which a waiter looks by itself: an abandoned hold wakes nobody."""
INSIDE = "inside"
ALWAYS = partial(bool, True)
"""Keeps a hold that no `with` statement keeps."""


class WithExit:
    """An `__exit__` that nothing but the running `with` statement keeps alive.

    `with` asks for it before it enters, and drops it however it ends. No variable and no traceback
    holds it, so that a weak reference to it (given to `opened`) tells whether that `with` still
    runs. `contextlib.ExitStack` asks the class and gets a plain method; there the manager has to
    do, which a traceback of an interrupt in ExitStack's frames keeps until it is collected.
    """

    def __init__(self, leave: Callable[..., None]) -> None:
        self.leave = leave

    def __get__(self, manager: Any, owner: type) -> Callable[..., None]:
        if manager is None:
            return self.leave
        leave = partial(self.leave, manager)
        manager.opened(leave)
        return leave


class Hold:
    """One stay inside a lock."""

    def __init__(self) -> None:
        self.outer: Hold | None = None
        """The hold inside which this one was made."""
        self.undo: list[Callable[[], object]] = []
        """What takes the changes away, latest last: put here before them, and fit to run twice."""
        self.closing = False
        """Whether nobody may enter any more."""
        self.keeper: Callable[[], object] | None = None
        """Returns None once nobody is left who would leave it."""
        self._place: dict[str, Hold] = {}
        self._thread = threading.get_ident()
        self._over = threading.Lock()
        self._over.acquire()

    @property
    def kept(self) -> bool:
        return self.keeper is not None and self.keeper() is not None

    @property
    def usable(self) -> bool:
        """Whether another hold may be made inside."""
        return not self.closing and self.kept

    @property
    def mine(self) -> bool:
        """Whether this thread made it."""
        return self._thread == threading.get_ident()

    @property
    def inner(self) -> "Hold | None":
        """The hold that was made inside."""
        return self._place.get(INSIDE)

    @property
    def entered(self) -> bool:
        return self.outer is not None and self.outer.inner is self

    def outwards(self) -> Iterator["Hold"]:
        """This one and those around it."""
        hold: Hold | None = self
        while hold is not None:
            yield hold
            hold = hold.outer

    def inwards(self) -> Iterator["Hold"]:
        """This one and those inside it."""
        hold: Hold | None = self
        while hold is not None:
            yield hold
            hold = hold.inner

    def take(self, outer: "Hold") -> "Hold":
        """Tries to become what is inside `outer`, and returns who is."""
        self.outer = outer
        return outer._place.setdefault(INSIDE, self)

    def give_back(self) -> None:
        """Takes its changes away and leaves its place."""
        self.run_undo()
        if self.outer is not None and self.entered:
            del self.outer._place[INSIDE]
        self.keeper = None
        if self._over.locked():
            self._over.release()

    def run_undo(self) -> None:
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def wait(self) -> None:
        """Until it is over, or for a moment."""
        if self._over.acquire(timeout=LOOK_AGAIN):
            self._over.release()


class HeldHere(RuntimeError):
    """Another task or a paused generator of this thread holds the model."""


def _entered(hold: Hold) -> bool:
    return hold.entered


class Entry(Generic[T]):
    """A `with` statement's way into a lock; leaving runs the `undo` of the hold."""

    def __init__(
        self,
        lock: "ContextLock",
        set_up: Callable[[Hold], T],
        wait: bool = True,
        at: Hold | None = None,
    ) -> None:
        self._lock, self._set_up, self._wait, self._at = lock, set_up, wait, at
        self._hold: Hold | None = None

    def opened(self, leave: Callable[..., None]) -> None:
        self._hold = Hold()
        self._hold.keeper = ref(leave, partial(self._lock.abandoned, self._hold))

    def __enter__(self) -> T:
        hold = self._hold
        if hold is None:
            hold = self._hold = Hold()
            hold.keeper = ref(self, partial(self._lock.abandoned, hold))
        try:
            if self._at is not None:
                hold.take(self._at)
            else:
                self._lock.enter(hold, self._wait)
            return self._set_up(hold)
        except BaseException:
            self._lock.abandoned(hold)
            raise

    def leave(self, *raised: Any) -> None:
        error = raised[1] if raised else None
        if self._hold is None:
            return
        if self._at is not None:
            self._hold.give_back()
        else:
            try:
                self._lock.leave(self._hold)
            except HeldHere as held:
                if error is None or isinstance(error, GeneratorExit):
                    raise
                error.add_note(str(held))
        self._hold = None

    __exit__ = WithExit(leave)


class _LockExit(WithExit):
    """As `WithExit`, of a new entry for every `with`, which the lock's `__enter__` enters."""

    def __get__(self, manager: Any, owner: type) -> Callable[..., None]:
        if manager is None:
            return self.leave
        manager.opened.append(entry := Entry(manager, _entered))
        return entry.__exit__


class ContextLock:
    """One context (`contextvars`) at a time. Re-entrant; copies of a context enter inside what it
    holds, one by one.

    A context whose hold is over counts as being in what was around it. Others wait; where the
    holder is another task or a paused generator of the thread that would wait: RuntimeError.
    """

    def __init__(self) -> None:
        self._root = Hold()
        self._root.keeper = ALWAYS
        self._newest: ContextVar[Hold] = ContextVar("newest")
        self._local = threading.local()

    def __reduce__(self) -> tuple[type["ContextLock"], tuple[()]]:
        """A copy is another lock, which nobody holds: it goes with a copy of what it guards."""
        return ContextLock, ()

    @property
    def here(self) -> Hold:
        """The innermost hold that this context is in; the lock's root where there is none."""
        return next(hold for hold in self._newest.get(self._root).outwards() if hold.usable)

    @property
    def held(self) -> bool:
        """Whether this context holds it."""
        return self.here is not self._root

    def entry(self, set_up: Callable[[Hold], T]) -> Entry[T]:
        """For `with`: enters, then `set_up` makes the changes; where that fails, they are undone.

        Raises RuntimeError on entering where waiting would never end, and on leaving where another
        task or a paused generator of this thread is still inside.
        """
        return Entry(self, set_up)

    def attempt(self) -> Entry[bool]:
        """For `with`: enters if it can without waiting; gives whether it did."""
        return Entry(self, _entered, wait=False)

    def enter(self, hold: Hold, wait: bool = True) -> None:
        """Makes a hold the innermost of this context; without `wait` it may stay outside."""
        while True:
            outer = self.here
            holder = hold.take(outer)
            if holder is hold and outer.usable:
                self._newest.set(hold)
                return
            if holder is hold:  # closed meanwhile
                del outer._place[INSIDE]
            elif not self._pass_by(holder, wait):
                return

    def _pass_by(self, holder: Hold, wait: bool) -> bool:
        """Clears away a hold in the way, or waits for it a moment; False where it may not wait."""
        alive = [hold for hold in holder.inwards() if hold.kept]
        if not alive:
            self.clear(holder)
        elif not wait:
            return False
        elif any(hold.mine for hold in alive):
            raise HeldHere(
                "The model is held in this very thread by the `with` (`applied`, `hooks`) of "
                "another task or of a paused generator, which cannot go on while this call waits "
                "for it; leave that `with` before awaiting or pausing, or make this call in a "
                "thread (`asyncio.to_thread`)."
            )
        else:
            alive[-1].wait()
        return True

    def leave(self, hold: Hold) -> None:
        """Undoes a hold's changes, once copies of its context in other threads have left it."""
        if not hold.entered:
            hold.keeper = None
            return
        hold.closing = True
        try:
            while hold.inner is not None:
                try:
                    self._pass_by(hold.inner, wait=True)
                except HeldHere as error:
                    hold.run_undo()
                    raise HeldHere(
                        "This `with` was left while another task or a paused generator of this "
                        "thread was still in a `with` begun inside it; its edits were taken away "
                        "all the same, but leave the inner one first."
                    ) from error
            hold.give_back()
        except BaseException:
            self.abandoned(hold)
            raise
        if hold.outer is not None and not hold.outer.kept:
            self.clear(hold.outer)

    def abandoned(self, hold: Hold, _keeper: object = None) -> None:
        """Notes that nobody will leave a hold, and clears it away unless somebody is inside it."""
        hold.keeper = None
        self.clear(hold)

    def clear(self, hold: Hold) -> None:
        """Takes away what an abandoned hold and those abandoned inside it changed.

        Not while somebody is inside, or clears them away already.
        """
        chain = list(hold.inwards())
        if any(each.kept for each in chain):
            return
        for dead in reversed(chain):
            with Entry(self, _entered, at=dead) as alone:
                if alone and dead.entered:
                    dead.give_back()

    # --- the lock itself in a `with`, and without one

    @property
    def opened(self) -> list[Entry[bool]]:
        """Entries of this thread's `with` statements that are about to be entered."""
        if not hasattr(self._local, "opened"):
            self._local.opened = []
        return self._local.opened

    def __enter__(self) -> "ContextLock":
        if self.opened:
            self.opened.pop().__enter__()
        else:
            self.acquire()
        return self

    def acquire(self, blocking: bool = True) -> bool:
        """Enters until `release`; without `blocking`, returns False where it would have to wait."""
        hold = Hold()
        hold.keeper = ALWAYS
        try:
            self.enter(hold, blocking)
        except BaseException:
            self.abandoned(hold)
            raise
        return hold.entered

    def release(self, *_error: object) -> None:
        """Leaves what `acquire` entered; RuntimeError where this context is not in there."""
        hold = self.here
        if hold is self._root or hold.keeper is not ALWAYS:
            told = "This context does not hold the lock by `acquire`"
            raise RuntimeError(f"{told}; call `release` where that was called.")
        self.leave(hold)

    __exit__ = _LockExit(release)
