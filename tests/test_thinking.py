"""Templates that open a think block themselves: what follows begins with a thought, and an answer
is what comes after its end. Decided from the prompt's tokens.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from small import small_suite

from qsae_kit import StudyConfig, refusal, steer_suite, steering_study
from qsae_kit.data.facts import general_facts
from qsae_kit.lm.answering import answer_all, says_no
from qsae_kit.lm.chat import THINK_CLOSE, Phase, first_said, spoken
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.steer.behaviours import judged
from qsae_kit.steer.benches import measure_benches
from qsae_kit.steer.judges import Judgement
from qsae_kit.steer.repeats import SAMPLING, answered_again
from qsae_kit.steer.study import search
from qsae_kit.steer.study.lab import Plan, Setting

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
ALWAYS = TURNS + "<think>\n{% endif %}"
ASKS = (
    TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
NEVER = TURNS + "{% endif %}"
SAID = {
    "I can't help with that, because": "B",
    "Fine, why not.\n</think>\n\nI can't help with that.": "S",
    "I can't help with that?\n</think>\n\nTake the saw and cut it.": "A",
}


@pytest.fixture(scope="module")
def models(lm):
    """The bundled model with each template."""
    made = {}
    for name, template in (("always", ALWAYS), ("asks", ASKS), ("never", NEVER)):
        tokenizer = copy.deepcopy(lm.tokenizer)
        tokenizer.chat_template = template
        made[name] = HookedLM(lm.hf, tokenizer, name)
    return made


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


@contextmanager
def saying(lm, texts):
    """The model says these texts, row by row, and ends its turn."""
    end = lm.markers.end
    rows = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    step = 0

    def write(_module, _args, logits):
        nonlocal step
        written = torch.full_like(logits, -1e4)
        for i, row in enumerate(rows):
            written[i, :, row[step] if step < len(row) else end] = 1e4
        step += 1
        return written

    handle = lm.hf.lm_head.register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def test_a_template_says_how_it_thinks(models):
    told = {name: (lm.has_thinking, lm.always_thinks) for name, lm in models.items()}
    assert told == {"always": (False, True), "asks": (True, False), "never": (False, False)}
    asked = {name: [lm.thinking(False)] for name, lm in models.items()}
    assert asked == {"always": [None], "asks": [False], "never": [None]}
    assert (models["always"].thinking(True), models["asks"].thinking(True)) == (None, True)
    with pytest.raises(
        ValueError, match="Thinking was asked for, but the chat template of 'never'"
    ):
        models["never"].thinking(True)


@pytest.mark.parametrize(
    ("name", "thinking", "opened"),
    [("always", None, True), ("asks", None, True), ("asks", True, True), ("asks", False, False)],
)
def test_an_answer_is_what_follows_the_thoughts_that_the_prompt_began(
    models, name, thinking, opened
):
    lm = models[name]
    prompts = ["Hello!"] * len(SAID)
    with saying(lm, SAID):
        out = answer_all(lm, prompts, [], 24, thinking)
    begins = "<think>\n" if opened else ""
    assert out.text == [begins + text for text in SAID]
    with saying(lm, SAID):
        found = judged(lm, refusal(), prompts, out, thinking, [(t, 0.0) for t in out.tokens])
    assert found.outcomes == ("".join(SAID.values()) if opened else "SSA")
    assert [says_no(text) for text in out.text] == (
        [False, True, False] if opened else [True] * 2 + [False]
    )
    assert [bool(spoken(text)) for text in out.text] == [not opened, True, True]


def test_streamed_parts_are_the_text_with_its_thoughts(models):
    lm = models["always"]
    streamed = ["".join(parts) for parts in zip(*lm.stream(["Hello!", "Hi"], 12), strict=True)]
    assert streamed == lm.generate(["Hello!", "Hi"], 12).text
    assert all(text.startswith("<think>\n") for text in streamed)


def test_a_fact_in_a_thought_is_no_answer(models):
    lm = models["always"]
    [fact] = general_facts(1)
    with saying(lm, ["Paris or Rome? It is Paris", "Rome?\n</think>\n\nIt is Paris."]):
        texts = lm.generate([fact.question] * 2, 24).text
    assert [fact.right(text) for text in texts] == [False, True]


def test_a_guard_judges_what_is_said_behind_the_thoughts(models, suite):
    lm, shown = models["always"], []

    def guard(prompts, answers):
        shown.extend(answers)
        return [Judgement("Safe", False, "")] * len(answers)

    prompts = {"xstest": {"safe": ["Hello!"]}}
    with saying(lm, ["I can't say.\n</think>\n\nYes."]):
        table = measure_benches(lm, refusal(), prompts, {}, suite, 16, guard=guard)
    assert shown == ["\n\nYes."]
    assert table["refusal_rate"].tolist() == [0.0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_thoughts_begin_in_the_prompt(models, use_cache):
    lm = models["always"]
    found, changed = [], []

    def look(x, hook):
        found.append(Phase(int(lm.now.phase[0, -1])).name)

    edit = Edit(
        "blocks.1.hook_resid_post", lambda x: changed.append(x.shape[1]) or x * 0, "thinking"
    )
    text = "A thought.\n</think>\n\nYes."
    with (
        saying(lm, [text]),
        lm.hooks(fwd_hooks=[("blocks.0.hook_resid_post", look)]),
        applied(lm, [edit]),
    ):
        out = lm.generate("Hello!", 24, use_cache=use_cache)
    close = out.tokens[0].index(lm.markers.think_close)
    # a pass looks at the prompt, then at every token but the last
    assert found[0] == "TEMPLATE"
    assert set(found[1 : close + 1]) == {"THINKING"}
    assert found[close + 1] == "TEMPLATE"
    assert found[-1] == "ANSWER"
    assert len(changed) == (close if use_cache else len(found) - 1)


def test_a_quoted_marker_opens_nothing(models, lm):
    for own in (*models.values(), lm):
        chat = [{"role": "user", "content": "What does <think>\n mean?"}]
        opened = own.opens_thoughts(own.chat_tokens(chat))
        assert opened == (own.tokenizer.chat_template in (ALWAYS, ASKS))
    continued = lm.to_chat("Hi", enable_thinking=True)
    for text, opened in (
        (continued, False),
        (continued + "<think>\nHm, so", True),
        (continued + "<think>\nHm.\n</think>\n\nYes", False),
        ("Some text <think>\n", True),
        ("Some text about <think> and more than a few other words", False),
    ):
        assert lm.opens_thoughts(lm.tokenizer(text).input_ids) == opened, text


def test_without_chat_markers_the_prompts_end_tells(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}User: {{ m.content }}\nBot: <think>\n{% endfor %}"
    )
    own = HookedLM(lm.hf, tokenizer, "other")
    own.markers = None
    assert own.always_thinks
    assert own.generate("Hi", 2).text[0].startswith("<think>\n")


def test_stock_refusals_are_no_thoughts(models, suite, monkeypatch):
    """What a contrast of answers reads: the refusals behind the end of an opened block."""
    seen = []

    def noted(lm, names, prompts, answers, thinking):
        seen.append([lm.to_string(row) for row in answers])
        return {}

    monkeypatch.setattr(search, "answer_activations", noted)
    kinds = {kind: ["Hello!", "Hi"] for kind in refusal().kinds}
    for name, begins in (("always", f"\n{THINK_CLOSE}\n\n"), ("never", "")):
        setting = Setting(
            models[name],
            suite,
            {"selection": kinds, "evaluation": {}},
            refusal(),
            StudyConfig(),
            "v",
            [],
        )
        plan = Plan("harmful", ("harmless",), "answers", (), torch.tensor([0]), False, False)
        journal = type("Kept", (), {"get": staticmethod(lambda _key, compute: compute())})()
        seen.clear()
        search.compared_groups(setting, plan, [], journal)
        assert all(said.startswith(begins) and said[len(begins)].isalpha() for said in seen[0])


def test_the_first_word_said_is_behind_thoughts_that_the_prompt_began(models):
    lm = models["always"]
    ids = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in SAID]
    opened = lm.opens_thoughts(lm.chat_tokens("Hello!"))
    first = [first_said(row, lm.markers, opened) for row in ids]
    assert first[0] is None
    answers = ["I can't", "Take the saw"]
    for one, answer in zip(first[1:], answers, strict=True):
        assert answer.startswith(lm.to_string([one]).strip()), lm.to_string([one])


def test_answers_of_a_model_that_always_thinks_are_drawn_as_thoughts_are(
    models, suite, monkeypatch
):
    from qsae_kit.steer import repeats

    drawn = []

    def noted(lm, groups, *args, sampling, seed):
        drawn.append(sampling)
        return [lm.generate(list(groups[0].prompts), 2)]

    monkeypatch.setattr(repeats, "answer_groups", noted)
    for name in ("always", "never"):
        lm = models[name]
        answered_again(lm, refusal(), {"harmful": ["Hi"]}, {}, suite, [0], 2, None)
    assert drawn == [SAMPLING[True], SAMPLING[False]]


def test_thinking_that_a_model_does_not_have_is_said(models, suite, tmp_path, monkeypatch):
    lm = models["never"]
    prompts = {kind: [f"{kind} {i}" for i in range(3)] for kind in refusal().kinds}
    others = {kind: [f"{kind} {i}" for i in range(3, 6)] for kind in refusal().kinds}
    monkeypatch.setattr(lm, "generate", lambda *a, **k: pytest.fail("work before the check"))
    config = StudyConfig(thinking=True)
    with pytest.raises(ValueError, match="Thinking was asked for"):
        steering_study(lm, suite, prompts, others, config=config)
    with pytest.raises(ValueError, match="Thinking was asked for"):
        steer_suite(lm, suite, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
