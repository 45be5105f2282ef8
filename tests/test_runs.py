"""One rule for what can be cut off: the same goes on, another is refused in a sentence, and nothing
of the user's is written over or deleted.
"""

import json

import pandas as pd
import pytest

from qsae_kit.evaluate import score
from qsae_kit.io.journal import Journal
from qsae_kit.io.runs import Run, check_same
from qsae_kit.pipelines import demo as demos
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.steer.study import STUDY_FILES

NAME, SITE = "test.run.json", "blocks.2.hook_resid_post"


@pytest.fixture
def sae(lm):
    """An SAE that fits the bundled model."""
    return TopKSAE(lm.d_model, 8, 2, Provenance("tiny", SITE, NormFilter(10.0)))


def begun(folder, identity, files=("a.csv", "sub/b.csv"), fresh=False):
    run = Run(folder, identity, files, name=NAME, what="test", fresh=fresh)
    run.begin()
    return run


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    ("given", "stored", "said"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b is 2 now and was 3 there"),
        ({"a": {"x": [1, 2]}}, {"a": {"x": [1, 5]}}, "a.x.1 is 2 now and was 5 there"),
        ({"a": 1}, {"a": 1, "z": None}, "z is absent now and was null there"),
        ({"a": 1}, {"a": True}, "a is 1 now and was true there"),
        ({"a": "x" * 100}, {"a": ""}, f'a is "{"x" * 56}... now and was "" there'),
    ],
)
def test_the_first_difference_is_named(tmp_path, given, stored, said):
    with pytest.raises(ValueError, match=r"there; give the same, or another folder") as error:
        check_same(tmp_path, "run", given, stored)
    assert said in str(error.value)
    assert "(--fresh, or fresh=True)" in str(error.value)
    check_same(tmp_path, "run", {"a": (1, 2)}, {"a": [1, 2]})


def test_the_same_goes_on_and_another_is_refused(tmp_path):
    run = begun(tmp_path, {"a": 1})
    write(tmp_path, "a.csv", "mine.csv")
    run.done("one", ["a.csv", "sub/b.csv"])
    again = begun(tmp_path, {"a": 1})
    assert list(again.stages) == ["one"]
    assert list(again.stages["one"]) == ["a.csv"]
    assert again.as_it_was("one")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="another test: a is 2 now and was 1 there"):
        begun(tmp_path, {"a": 2})
    assert content(tmp_path) == before
    (tmp_path / "a.csv").write_text("other")
    assert not again.as_it_was("one")
    again.again("one")
    assert begun(tmp_path, {"a": 1}).stages == {}


def test_started_anew_only_what_the_record_names_goes(tmp_path):
    run = begun(tmp_path, {"a": 1})
    write(tmp_path, "a.csv", "sub/b.csv", "mine.csv", "sub/mine.csv")
    run.done("one", ["a.csv"])  # cut off before the other one was noted
    begun(tmp_path, {"a": 2}, ["c.csv"], fresh=True)
    assert set(content(tmp_path)) == {NAME, "mine.csv", "sub/mine.csv"}
    write(tmp_path, "other.csv")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"other.csv' is of no test, and would be written over"):
        begun(tmp_path, {"a": 3}, ["other.csv"], fresh=True)
    assert content(tmp_path) == before


def test_what_the_user_changed_is_not_deleted(tmp_path):
    run = begun(tmp_path, {"a": 1})
    write(tmp_path, "a.csv")
    run.done("one", ["a.csv"])
    (tmp_path / "a.csv").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="was changed since it was made, so it stays"):
        begun(tmp_path, {"a": 2}, fresh=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_it_makes_room_it_can_be_started_anew_again(tmp_path, monkeypatch, moment):
    run = begun(tmp_path, {"a": 1})
    write(tmp_path, "a.csv", "sub/b.csv")
    run.done("one", ["a.csv", "sub/b.csv"])
    left, inner = [moment], Run._remove

    def dies(self, path):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        inner(self, path)

    monkeypatch.setattr(Run, "_remove", dies)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path, {"a": 2}, fresh=True)
    monkeypatch.setattr(Run, "_remove", inner)
    begun(tmp_path, {"a": 2}, fresh=True)
    assert set(content(tmp_path)) == {NAME}
    begun(tmp_path, {"a": 2})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        '{"mine": 1}',
        '{"run": {}, "stages": {"x": 5}}',
        '{"run": {}, "files": 5, "stages": {}}',
        '{"run": {}, "files": ["../victim"], "stages": {}}',
        '{"run": {}, "stages": {"x": {"../victim": {"bytes": 1, "sha256": "x"}}}}',
    ],
)
def test_a_record_that_is_none(tmp_path, text):
    out = tmp_path / "out"
    write(tmp_path, "victim")
    write(out, "a.csv")
    (out / NAME).write_text(text)
    before = content(tmp_path)
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"no record of a test|is not JSON|has the name"):
            begun(out, {}, fresh=fresh)
    assert content(tmp_path) == before


def test_a_journal_starts_anew_with_its_products(tmp_path):
    path = tmp_path / "seeds.jsonl"
    write(tmp_path, "seeds.csv")
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"seeds.csv' is of no run, and would be written over"):
            Journal(path, {"a": 1}, ["seeds.csv"], fresh)
    assert content(tmp_path) == {"seeds.csv": "seeds.csv"}
    (tmp_path / "seeds.csv").unlink()
    Journal(path, {"a": 1}, ["seeds.csv"]).get("x", lambda: 5)
    write(tmp_path, "seeds.csv", "mine.csv")
    assert Journal(path, {"a": 2}, ["seeds.csv"], fresh=True).done == {}
    assert set(content(tmp_path)) == {"seeds.jsonl", "mine.csv"}
    assert json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize("fresh", [False, True])
def test_an_evaluation_leaves_the_user_s_own_tables(lm, sae, tmp_path, monkeypatch, fresh):
    monkeypatch.setattr(score, "_score_suite", lambda *rest: pytest.fail("it was begun"))
    suite = {"v": {sae.provenance.hook_name: sae}}
    write(tmp_path, "evaluation.csv")
    with pytest.raises(ValueError, match="is of no evaluation, and would be written over"):
        score.score_suite(lm, suite, None, 500, tmp_path, fresh=fresh, bar=False)
    assert content(tmp_path) == {"evaluation.csv": "evaluation.csv"}


def test_an_evaluation_is_made_again_and_another_one_refused(lm, sae, tmp_path, monkeypatch):
    suite = {"v": {sae.provenance.hook_name: sae}}

    def made(lm, suite, data, tokens, out, *rest):
        (out / "evaluation.csv").write_text(f"{tokens}")
        return score.Scores(pd.DataFrame())

    monkeypatch.setattr(score, "_score_suite", made)
    for _ in range(2):
        score.score_suite(lm, suite, None, 500, tmp_path, bar=False)
    with pytest.raises(ValueError, match="another evaluation: tokens is 600 now and was 500 there"):
        score.score_suite(lm, suite, None, 600, tmp_path, bar=False)
    assert (tmp_path / "evaluation.csv").read_text() == "500"
    write(tmp_path, "evaluation.md")
    score.score_suite(lm, suite, None, 600, tmp_path, fresh=True, bar=False)
    assert content(tmp_path).keys() == {"evaluation.csv", "evaluation.md", score.EVALUATION}
    assert (tmp_path / "evaluation.csv").read_text() == "600"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["evaluation.csv", "report.html", f"induce/{STUDY_FILES[0]}"])
def test_a_demo_leaves_the_user_s_own_files(lm, tmp_path, monkeypatch, name, fresh):
    monkeypatch.setattr(demos, "train_saes", lambda *rest, **more: pytest.fail("it was begun"))
    write(tmp_path, name)
    with pytest.raises(ValueError, match="is of no demo, and would be written over"):
        demos.run_demo(lm, tmp_path, fresh=fresh, bar=False)
    assert content(tmp_path) == {name: name}
