"""SteeringLab without a browser: runs, stops, order, settings, files; and what it shows of every
token.
"""

import threading
import time

import pytest
import torch
from small import small_suite

from qsae_kit import Change, Condition, Steering, SteeringLab, answer_pair, token_table
from qsae_kit.attach import token_features
from qsae_kit.lm.edits import applied
from qsae_kit.steer.changes import read_steering

PROMPT = "How do I thank the nurse?"


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


@pytest.fixture
def lab(lm, suite):
    view = SteeringLab(lm, suite, PROMPT)
    view.sent_messages = []
    view.send = lambda content, buffers=None: view.sent_messages.append(content)
    yield view
    view.halt()
    view.close()


def messages(view, op):
    return [m for m in view.sent_messages if m["op"] == op]


@torch.no_grad()
def test_both_answers_come_from_one_seed_and_differ_by_the_edits_alone(lm, suite):
    edits = Steering(
        (Change("add", "blocks.3.hook_resid_post", "v", (1,), strength=2.0, positions="answer"),)
    ).edits(suite)
    options = {"enable_thinking": True, "do_sample": True, "temperature": 1.4}
    same = answer_pair(lm, PROMPT, [], 30, seed=4, **options)
    assert same.base.tokens == same.steered.tokens
    pair = answer_pair(lm, PROMPT, edits, 30, seed=4, **options)
    assert pair.base.tokens == same.base.tokens != pair.steered.tokens
    with applied(lm, edits):
        alone = lm.generate(PROMPT, 30, seed=4, **options)
    assert alone.tokens == pair.steered.tokens
    again = answer_pair(lm, PROMPT, edits, 30, seed=4, base=pair.base, **options)
    assert again.steered.tokens == pair.steered.tokens


@torch.no_grad()
def test_the_table_of_tokens_is_the_generation_read_again(lm, suite):
    sae = suite["v"]["blocks.3.hook_resid_post"]
    edits = Steering(
        (Change("clamp", "blocks.3.hook_resid_post", "v", (1,), strength=0.5, positions="answer"),)
    ).edits(suite)
    pair = answer_pair(lm, PROMPT, edits, 20, enable_thinking=False)
    table = token_table(lm, pair.prompt, pair.steered.tokens[0], edits, (sae, 1))
    torch.testing.assert_close(
        torch.tensor(table["logprob"].to_list()),
        torch.tensor(pair.steered.logprobs[0]),
        atol=1e-4,
        rtol=1e-4,
    )
    clean = token_table(lm, pair.prompt, pair.base.tokens[0])
    torch.testing.assert_close(
        torch.tensor(clean["logprob"].to_list()),
        torch.tensor(pair.base.logprobs[0]),
        atol=1e-4,
        rtol=1e-4,
    )
    assert (clean["change"] == 0).all()
    assert clean["activation"].isna().all()
    ids = torch.tensor([pair.prompt + pair.steered.tokens[0]])
    with applied(lm, edits):
        _, cache = lm.run_with_cache(ids, names_filter=["blocks.3.hook_resid_post"])
    direct = sae.encode(cache["blocks.3.hook_resid_post"][0, len(pair.prompt) :])[:, 1]
    torch.testing.assert_close(
        torch.tensor(table["activation"].to_list()), direct, atol=1e-3, rtol=1e-4
    )


def test_a_run_streams_both_answers_and_the_next_one_only_the_steered(lm, lab):
    lab.add(1, strength=1.5)
    lab.policy = "answer"
    lab.run(wait=True)
    first = lab.answers
    assert first["base"]["text"] == lm.generate(PROMPT, 48, enable_thinking=False).text[0]
    assert first["steered"]["text"] != first["base"]["text"]
    assert {m["name"] for m in messages(lab, "text")} == {"base", "steered"}
    assert first["steered"]["text"].startswith(messages(lab, "text")[-1]["text"])
    assert (
        len(first["steered"]["tokens"])
        == len(first["steered"]["change"])
        == len(first["steered"]["activation"])
    )
    lab.controls = [{**lab.controls[0], "strength": -1.5}]
    lab.run(wait=True)
    assert lab.answers["base"] == first["base"] | {"activation": lab.answers["base"]["activation"]}
    frame = lab.to_frame()
    assert list(frame["setting"]) == [
        "add at blocks.1.hook_resid_post: 1 +1.50",
        "add at blocks.1.hook_resid_post: 1 -1.50",
    ]
    assert not lab.running
    lab.controls = [{**lab.controls[0], "on": False}]
    lab.run(wait=True)
    assert lab.answers["steered"]["text"] == first["base"]["text"]
    assert lab.controls[0]["strength"] == -1.5  # switched off, the setting stays


def test_quick_moves_end_in_the_last_ones_text(lm, suite, lab):
    lab.add(2, "blocks.3.hook_resid_post")
    lab.policy = "answer"
    for strength in (0.5, 1.0, 1.5, 2.0, 2.5):
        lab.controls = [{**lab.controls[0], "strength": strength}]
        lab.handle({"op": "run"})
    lab._thread.join()
    with applied(lm, lab.steering.edits(suite)):
        assert (
            lab.answers["steered"]["text"] == lm.generate(PROMPT, 48, enable_thinking=False).text[0]
        )
    assert lab.answers["number"] == 5
    assert lab.to_frame()["setting"].iloc[-1].endswith(": 2 +2.50")
    assert [m["number"] for m in messages(lab, "text")] == sorted(
        m["number"] for m in messages(lab, "text")
    )


def test_stop_stops_and_what_was_written_stays(lm, lab):
    lab.max_new_tokens, lab.thinking = 400, True
    lab.sample = True
    steps = []
    generate = lm.generate

    def slow(*args, on_step=None, **options):
        def told(step):
            steps.append(step)
            if len(steps) == 5:
                lab.handle({"op": "stop"})
            on_step(step)

        return generate(*args, on_step=told, **options)

    lm.generate = slow
    try:
        lab.run(wait=True)
    finally:
        del lm.generate
    assert len(steps) <= 7
    assert lab.status == "Stopped."
    assert lab.answers["stopped"]
    assert not lab.running
    assert lm.lock.acquire(blocking=False)
    lm.lock.release()


def test_a_busy_model_is_waited_for(lm, lab):
    held, go = threading.Event(), threading.Event()

    def cell():
        with lm.lock:
            held.set()
            go.wait(20)

    other = threading.Thread(target=cell)
    other.start()
    held.wait()
    lab.run()
    for _ in range(200):
        if "busy" in lab.status:
            break
        time.sleep(0.01)
    assert "busy" in lab.status
    assert not lab.answers
    go.set()
    other.join()
    lab._thread.join()
    assert lab.answers["steered"]["text"]
    assert lab.status == ""


def test_other_threads_wait_for_the_model_and_so_do_their_hooks(lm, lab, suite):
    """A search or a cell beside an answer neither hangs the page nor gets hooks that are not its
    own.
    """
    ids = torch.tensor([lm.chat_tokens(PROMPT, False)])
    with torch.no_grad():
        _, clean = lm.run_with_cache(ids, names_filter=["blocks.1.hook_resid_post"])
    found = []

    def cell():
        with torch.no_grad():
            found.append(
                lm.run_with_cache(ids, names_filter=["blocks.1.hook_resid_post"])[1][
                    "blocks.1.hook_resid_post"
                ]
            )

    edits = Steering(
        (Change("add", "blocks.1.hook_resid_post", "v", (1,), strength=3.0, positions="all"),)
    ).edits(suite)
    other = threading.Thread(target=cell)
    with applied(lm, edits):
        other.start()
        time.sleep(0.3)
        assert not found
        with pytest.raises(ValueError, match="holds the model"):
            lab.run(wait=True)
        blocked = threading.Thread(target=lambda: lab.answer({"op": "find", "site": 0, "text": ""}))
        blocked.start()
        blocked.join(5)
        assert not blocked.is_alive()
        assert "busy" in lab.status
    other.join()
    torch.testing.assert_close(found[0], clean["blocks.1.hook_resid_post"])


def test_settings_are_values_presets_and_files(lm, suite, lab):
    lab.add(3, "blocks.3.hook_resid_post", 1.0, "clamp")
    lab.policy = "all"
    kept = lab.steering
    assert kept == Steering(
        (Change("clamp", "blocks.3.hook_resid_post", "v", (3,), strength=1.0, positions="all"),)
    )
    lab.handle({"op": "keep", "name": "  mine "})
    lab.handle({"op": "study"})
    assert read_steering(lab.sent, suite) == kept
    lab.controls, lab.policy = [], "header"
    lab.handle({"op": "take", "name": "mine"})
    assert lab.steering == kept
    other = SteeringLab(lm, suite, PROMPT, steering=kept)
    assert other.steering == kept
    lab.controls = []
    lab.read(kept.to_json(suite))
    assert lab.steering == kept
    for wrong in (
        Change("add", "blocks.3.hook_resid_post", "v", (1, 2)),
        Change(
            "add",
            "blocks.3.hook_resid_post",
            "v",
            (1,),
            when=Condition("v", "blocks.1.hook_resid_post", (1,)),
        ),
        Change("add", "blocks.3.hook_resid_post", direction=(1.0,), median_norm=1.0),
        Change("add", "blocks.3.hook_resid_post", "v", (1,), orthogonal_to=((1.0,) * lm.d_model,)),
    ):
        with pytest.raises(ValueError, match="one feature each"):
            lab.load(Steering((wrong,)))


def test_finding_features(lab):
    assert lab.found["features"]
    sae = lab.suite.sae(lab.choices[0])
    (f,) = token_features(lab.lm, sae, [lab.lm.chat_tokens(PROMPT, False)])
    assert [i for i, _ in lab.found["features"]] == f.amax(0).topk(
        len(lab.found["features"])
    ).indices.tolist()
    lab.handle({"op": "find", "site": 1, "text": "7"})
    assert lab.found == {"site": 1, "text": "7", "features": [[7, ""]]}
    lab.answer({"op": "find", "site": 1, "text": "greeting"})
    assert "'greeting' was searched for, but there is no index" in lab.status
    assert lab.indexed == [False] * len(lab.choices)
    lab.handle({"op": "add", "site": 1, "feature": 7})
    assert messages(lab, "added")[0]["control"] | {"name": ""} == {
        "site": 1,
        "feature": 7,
        "name": "",
        "action": "add",
        "strength": 0.0,
        "on": True,
    }


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"policy": "everywhere"}, "no position policy"),
        (
            {
                "controls": [
                    {
                        "site": 0,
                        "feature": 999,
                        "name": "",
                        "action": "add",
                        "strength": 1.0,
                        "on": True,
                    }
                ]
            },
            "features 0 to 63",
        ),
        (
            {
                "controls": [
                    {
                        "site": 0,
                        "feature": 1,
                        "name": "",
                        "action": "add",
                        "strength": float("nan"),
                        "on": True,
                    }
                ]
            },
            "finite number",
        ),
    ],
)
def test_impossible_settings_are_said_and_nothing_runs(unchecked, lab, traits, message):
    for name, value in traits.items():
        setattr(lab, name, value)
    lab.answer({"op": "run"})
    assert message in lab.status
    assert not lab.running
    lab.answer({"op": "find", "site": 0, "text": "64"})
    assert "features 0 to 63" in lab.status
    lab.answer({"op": "keep", "name": " "})
    assert "needs a name" in lab.status
    with pytest.raises(ValueError, match=r"no SAE at 'blocks.77"):
        lab.add(1, "blocks.77.hook_resid_post")


def test_the_page_without_a_kernel_holds_the_last_try(lab, tmp_path):
    lab.add(1, strength=1.0)
    lab.run(wait=True)
    page = lab.to_html(tmp_path / "lab.html").read_text(encoding="utf-8")
    assert lab.answers["base"]["text"].split("'")[0] in page
    assert repr(lab) == "SteeringLab(3 SAEs, 1 sliders, 1 try)"
    assert lab.answers["base"]["text"][:10] in lab.fallback()
