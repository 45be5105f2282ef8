"""Chat templates as programs from elsewhere: bounded in time and size, and errors as a sentence."""

import sys
import threading
import time

import pytest
from transformers import AutoTokenizer

from qsae_kit.lm import templates
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.sources import TINY_WEIGHTS
from qsae_kit.lm.templates import within

CHAT = [{"role": "user", "content": "Hi"}]
LOOPS = "{% for i in range(99999) %}" * 2 + "{% set k = i %}" + "{% endfor %}" * 2


@pytest.fixture
def own(lm):
    """The bundled model with another tokenizer, whose template a test may set."""
    return HookedLM(lm.hf, AutoTokenizer.from_pretrained(TINY_WEIGHTS), "own")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('No system role') }}", "No system role"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ {}.popitem() }}", "KeyError|SecurityError|popitem"),
        ("{{ 'a'.encode('ascii').decode('utf-16') }}", "codec can't decode"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a'[0:1].center(10.5) }}", "TypeError"),
        ("{{ (1.5e300 * 1.5e300)|int }}", "more than 10,000,000"),
        ("{{ (messages|length / 1e-320)|int }}", "OverflowError"),
        ("{{ 'a' * 10**10 }}", "powers"),
        ("{{ 'a' * 10_000_000_000 }}", "more than 10,000,000"),
        ("{{ 100_000 * (1_000 * 'a') }}", "more than 10,000,000"),
        ("{{ '%9999999999d' % 1 }}", "digits"),
        ("{% set a = 'a' * 1000000 %}{% for i in range(11) %}{{ a }}{% endfor %}", "11,000,000"),
        ("{{ '\\ud800' }}", "half a character"),
        ({"default": 7}, "it is int instead of text"),
        ({"rag": "x", "tool_use": "y"}, "multiple chat templates|default|choose"),
        (["x"], "it is list|list"),
        (7, "int"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(own, template, reason):
    own.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason) as caught:
        own.to_chat("Hi")
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith("The chat template of 'own' refuses messages of the roles user (")
    assert "\n" not in message
    assert len(message) < 600


def test_messages_that_are_none_are_named(unchecked, own):
    with pytest.raises(ValueError, match="roles 1, None"):
        own.to_chat([1, {"content": "Hi"}])
    with pytest.raises(ValueError, match="half a character"):
        own.to_chat("\ud800")


@pytest.mark.parametrize("template", [LOOPS, "{{ enable_thinking }}" + LOOPS])
def test_a_template_that_never_ends_is_left(own, monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 0.4)
    own.tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"it did not end within 0\.4 seconds"):
        own.to_chat("Hi", enable_thinking=None if template is LOOPS else True)
    assert time.monotonic() - began < 3
    own.tokenizer.chat_template = "{{ messages[0].content }}"
    assert own.to_chat("Hi") == "Hi"


def test_templates_of_several_threads_are_left_alone_by_each_others_limit(own):
    def endless():
        while True:
            pass

    ends = []

    def run(seconds):
        try:
            within(seconds, endless)
        except templates._TooLong:
            ends.append(seconds)

    threads = [threading.Thread(target=run, args=(seconds,)) for seconds in (0.2, 0.4, 1.0)]
    [thread.start() for thread in threads]
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        assert within(30.0, lambda: own.to_chat("Hi"))
    [thread.join(5) for thread in threads]
    assert sorted(ends) == [0.2, 0.4, 1.0]


def test_a_limit_never_reaches_what_comes_after(monkeypatch):
    """Calls that end about when their time is up: they return or raise, and then it is over."""
    monkeypatch.setattr(templates, "TICK", 0.0005)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    late = 0
    try:
        for n in range(600):
            ends = time.monotonic() + 0.002 + 1e-6 * n

            def busy(ends=ends):
                while time.monotonic() < ends:
                    pass

            try:
                within(0.002, busy)
            except templates._TooLong:
                late += 1
            assert not templates._watch.jobs
            for _ in range(200):  # would be hit here
                pass
    finally:
        sys.setswitchinterval(interval)
    assert 0 < late < 600


def test_what_swallows_the_end_gets_it_again(monkeypatch):
    swallowed = []

    def deaf():
        while True:
            try:
                while True:
                    pass
            except BaseException:
                if swallowed:
                    raise
                swallowed.append(1)

    with pytest.raises(templates._TooLong):
        within(0.3, deaf)
    assert swallowed == [1]


def test_a_limit_costs_microseconds():
    within(1.0, int)
    began = time.perf_counter()
    for _ in range(2000):
        within(1.0, int)
    assert (time.perf_counter() - began) / 2000 < 1e-4
