"""The study's honesty: apart prompts, matched controls, and outcomes that follow the planted
cause.
"""

import io
import json
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from small import small_suite

import qsae_kit
import qsae_kit.steer.steer_suite as steer_suite_module
from qsae_kit.data import prompts as prompt_sets
from qsae_kit.data.companions import GENERAL, WORLD
from qsae_kit.io.journal import Journal
from qsae_kit.io.progress import tqdm
from qsae_kit.metrics.detection import auc, detector_curve
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import Behaviour, Verdict, refusal, tiny_study
from qsae_kit.steer.changes import (
    Condition,
    FeatureSet,
    ablate_features,
    add_features,
    check_features,
    clamp_features,
    load_steering,
    read_steering,
)
from qsae_kit.steer.choose.contrast import (
    Contrast,
    choose_features,
    contrast,
    decision_activations,
    fit_features,
    random_features,
)
from qsae_kit.steer.choose.detector import FoundDetector, detector_scores
from qsae_kit.steer.judges import Judgement
from qsae_kit.steer.report import write_study
from qsae_kit.steer.steer_suite import config_for
from qsae_kit.steer.study import STUDY_FILES, StudyConfig, Unsteered, search, steering_study
from qsae_kit.steer.study.arms import arms
from qsae_kit.steer.study.chosen import likely_choice
from qsae_kit.steer.study.findings import COLUMNS, study_table, verdict
from qsae_kit.steer.study.lab import Lab, Plan, Progress, Setting
from qsae_kit.steer.study.measure import measure, price_elsewhere
from qsae_kit.steer.study.search import aim_of
from qsae_kit.steer.study.steps import (
    BAR,
    DETECTOR_FILES,
    announced,
    check_prompts,
    expected_work,
    list_arms,
    plan_of,
    steered_sites,
)
from qsae_kit.steer.study.trials import trial

SITE = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def sae(lm):
    """An SAE of the bundled model whose first feature is the planted difference of refusing and
    answering.
    """
    sets = tiny_study("refusal", 24, 24).selection
    acts = {
        k: decision_activations(lm, [SITE], sets[k], False)[SITE]
        for k in ("harmful", "harmless", "borderline")
    }
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(160, 256, 16.0, Provenance("tiny", SITE, NormFilter(64.0)))
    sae.init_from_rows(torch.cat(list(acts.values())), generator)
    return sae.requires_grad_(False), acts


def test_the_worlds_selection_and_evaluation_share_no_template_and_no_prompt():
    sets = {
        split: [p for kind in prompt_sets.KINDS for p in WORLD.prompts(kind, 60, split)]
        for split in prompt_sets.SPLITS
    }
    templates = {split: {p.template for p in found} for split, found in sets.items()}
    assert not templates["selection"] & templates["evaluation"]
    assert not {p.text for p in sets["selection"]} & {p.text for p in sets["evaluation"]}
    assert all(len({p.text for p in found}) == 180 for found in sets.values())


def test_more_prompts_than_there_are_is_said():
    with pytest.raises(ValueError, match="were asked for"):
        GENERAL.prompts("harmful", 10_000, "selection")
    with pytest.raises(ValueError, match="'evil'"):
        WORLD.prompts("evil", 5, "selection")
    with pytest.raises(ValueError, match="'evil'"):
        GENERAL.prompts("evil", 5, "selection")


def test_contrast_and_choice_by_hand():
    sae = TopKSAE(2, 3, 3.0, Provenance("m", SITE, NormFilter(1.0)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.W_dec.copy_(torch.eye(3)[:, :2])
    found = contrast(
        sae, torch.tensor([[4.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    )
    assert found.feature_gap.tolist() == [3.0, -1.0, 2.0]
    assert found.mean_gap.tolist() == [3.0, -1.0]
    assert found.alive.tolist() == [0, 1, 2]
    chosen = choose_features(found, 2)
    assert chosen == FeatureSet((0, 2), (3.0, 2.0))
    torch.testing.assert_close(chosen.direction(sae), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="No feature differs"):
        choose_features(Contrast(torch.zeros(3), torch.zeros(2), torch.arange(3)))


def test_fitted_features_by_hand():
    sae = TopKSAE(2, 3, 3.0, Provenance("m", SITE, NormFilter(1.0)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3)[:, :2])
    found = Contrast(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.arange(3))
    chosen = fit_features(sae, found, 3)  # feature 2 differs, but its decoder row explains nothing
    assert chosen.features == (0, 1)
    assert chosen.weights == pytest.approx((3.0, -1.0))
    assert fit_features(sae, found, 1).features == (0,)
    # feature 0 would have to push against its gap
    against = found._replace(feature_gap=torch.tensor([-3.0, -1.0, 2.0]))
    assert fit_features(sae, against).features == (1,)
    with pytest.raises(ValueError, match="No feature differs"):
        fit_features(sae, Contrast(torch.zeros(3), torch.zeros(2), torch.arange(3)))


def test_random_draws_have_the_chosen_size_and_other_features(sae):
    sae, acts = sae
    found = contrast(sae, acts["harmful"], acts["harmless"])
    chosen = choose_features(found, 10)
    draws = [random_features(found, chosen, torch.Generator().manual_seed(s)) for s in range(20)]
    x = torch.randn(1, 4, 160)
    size = add_features(sae, chosen, 1.5, "all").delta(x).norm(dim=-1)
    for draw in draws:
        assert len(draw.features) == 10
        assert not set(draw.features) & set(chosen.features)
        assert sorted(map(abs, draw.weights)) == pytest.approx(sorted(map(abs, chosen.weights)))
        torch.testing.assert_close(add_features(sae, draw, 1.5, "all").delta(x).norm(dim=-1), size)
    assert len({draw.features for draw in draws}) == 20
    few = found._replace(alive=torch.tensor(chosen.features))
    with pytest.raises(ValueError, match="Only 0 other features"):
        random_features(few, chosen, torch.Generator())


def test_clamp_and_ablate_set_the_feature_and_keep_the_rest(sae):
    sae, acts = sae
    x = acts["harmful"][:8]
    f = sae.encode(x)
    feature = int(f.mean(0).argmax())
    ablated = x + ablate_features(sae, [feature]).delta(x)
    torch.testing.assert_close(ablated, x - f[:, [feature]] * sae.W_dec[feature])
    clamped = x + clamp_features(sae, [feature], 7.0).delta(x)
    torch.testing.assert_close(clamped, x + (7.0 - f[:, [feature]]) * sae.W_dec[feature])
    unchanged = x + clamp_features(sae, [feature], float(f[0, feature])).delta(x)
    torch.testing.assert_close(unchanged[0], x[0])


@pytest.mark.parametrize(
    ("features", "message"),
    [([], "No feature"), ([256], "features 0 to 255"), ([-1], "Feature -1")],
)
def test_features_out_of_range(sae, features, message):
    with pytest.raises(ValueError, match=message):
        check_features(sae[0], features)


def test_prompt_sets_are_checked():
    good = {"harmful": ["a"], "harmless": ["b"], "borderline": ["c"]}
    other = {"harmful": ["d"], "harmless": ["e"], "borderline": ["f"]}
    check_prompts(refusal(), "", good, other)
    for bad, message in (
        ({**other, "harmless": ["a"]}, "'a' among them"),
        ({**other, "borderline": []}, "no borderline evaluation"),
        ({"harmful": ["d"]}, "There are no (harmless|borderline) evaluation prompts"),
        ({**other, "borderline": [" "]}, "is empty"),
        ({**other, "rude": ["x"]}, "rude prompts were given; refusal has harmful"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prompts(refusal(), "", good, bad)
    with pytest.raises(ValueError, match="no rude selection"):
        check_prompts(refusal(), "rude", good, other)


@pytest.mark.parametrize(
    "field",
    [
        {"strengths": ()},
        {"strengths": (float("nan"),)},
        {"strengths": (-1.0,)},
        {"n_features": 11},
        {"n_random": -1},
        {"goal": "both"},
        {"interventions": ("here",)},
        {"shares": (3.0,)},
        {"goal": "induce", "interventions": ("project_out",)},
        {"conditional": True, "interventions": ("project_out",)},
        {"contrast": "none"},
        {"n_trials": 0},
    ],
)
def test_impossible_studies(unchecked, field):
    with pytest.raises(ValueError, match=r"was given|were given|cannot induce"):
        StudyConfig(**field)


SMALL = StudyConfig(
    strengths=(0.3, 0.8, 1.5),
    interventions=("add_header",),
    n_candidates=4,
    n_trials=1,
    n_random=2,
    n_noise=1,
    dose_prompts=4,
    search_prompts=4,
    cost_prompts=4,
    n_facts=4,
    max_new_tokens=24,
)


def same(one, other):
    pd.testing.assert_frame_equal(one.table, other.table)
    assert (one.headline, one.verdict) == (other.headline, other.verdict)


@pytest.fixture(scope="module")
def run(lm, tmp_path_factory):
    """A study with made SAEs that was interrupted twice, and its folder."""
    suite = small_suite(lm) | {"v-frozen_decoder": small_suite(lm)["v"]}
    made = tiny_study("refusal", 6, 10)
    folder = tmp_path_factory.mktemp("study")
    for steps in (9, 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "get", stopping_after(steps))
            with pytest.raises(KeyboardInterrupt):
                steering_study(
                    lm,
                    suite,
                    made.selection,
                    made.evaluation,
                    made.behaviour,
                    SMALL,
                    folder=folder,
                    bar=False,
                )
    study = steering_study(
        lm, suite, made.selection, made.evaluation, made.behaviour, SMALL, folder=folder, bar=False
    )
    return suite, made, study, folder


def stopping_after(steps, get=Journal.get):
    left = [steps]

    def until(self, key, compute):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return get(self, key, compute)

    return until


def test_a_study_that_was_cut_off_gives_the_same_digits(lm, run):
    suite, made, study, folder = run
    whole = steering_study(
        lm, suite, made.selection, made.evaluation, made.behaviour, SMALL, bar=False
    )
    same(whole, study)
    with pytest.raises(ValueError, match=r"is of another run: config\.[a-z_]+ is .* there; give"):
        steering_study(
            lm,
            suite,
            made.selection,
            made.evaluation,
            made.behaviour,
            replace(SMALL, seed=1),
            folder=folder,
            bar=False,
        )


def test_what_a_study_holds(run):
    _, made, study, _ = run
    table = study.table
    assert all(name in COLUMNS for name in table.columns)
    answered = table[table["refusal_rate"].notna()]
    rates = ["refusal_rate", "deflected_rate", "answered_rate", "broken_rate"]
    shares = answered[rates].sum(axis=1)
    assert shares.tolist() == pytest.approx([1.0] * len(shares))
    arms = answered[answered["chosen"]].groupby("intervention")["prompt_kind"].nunique().to_dict()
    whole = {
        "features": 3,
        "difference_of_means": 3,
        "difference_of_means_best": 3,
        "system_prompt": 3,
        "frozen_decoder_sae": 3,
    }
    assert arms == whole | {"wrong_sign": 1, "random": 1, "random_single": 1, "noise": 1}
    doses = table[table["refusal_rate"].isna()]
    assert sorted(set(doses["strength"])) == [-1.5, -0.8, -0.3, 0.3, 0.8, 1.5]
    assert len(doses) == 3 * 6 * 3  # the features, the difference of means here and at its best
    assert (doses["kl_first_low"] <= doses["kl_first"]).all()
    assert (doses["kl_first"] >= 0).all()
    assert (doses["log_odds_low"] <= doses["log_odds"]).all()
    assert (doses["log_odds"] <= doses["log_odds_high"]).all()
    assert (doses["log_odds_low"] < doses["log_odds_high"]).any()
    ours = answered[(answered["intervention"] == "features") & answered["target"]]
    assert ours["strength"].abs().isin([*SMALL.strengths]).all()
    assert (ours["strength"] < 0).all()  # suppressing goes against the direction
    assert ours["chosen"].sum() == 1
    h = study.headline
    change = {
        kind: float(
            answered[
                (answered["intervention"] == "features")
                & answered["chosen"]
                & (answered["prompt_kind"] == kind)
            ]["change"].iloc[0]
        )
        for kind in made.evaluation
    }
    selectivity = -change["harmful"] + (change["harmless"] + change["borderline"]) / 2
    assert h["selectivity"]["features"][0] == pytest.approx(selectivity)
    assert study.candidates["chosen"].sum() <= 5
    assert len(study.chosen.features.features) <= 5
    assert set(study.examples["prompt_kind"]) == set(made.evaluation)


def test_random_controls_have_the_size_of_the_features(lm, run):
    suite, _, study, _ = run
    sae = suite["v"][study.chosen.hook_name]
    x = torch.randn(1, 3, lm.d_model)
    (ours,) = study.steering.edits(suite)
    other = study.steering.changes[0]
    draw = replace(
        other, features=tuple(range(len(other.features))), weights=other.weights[::-1]
    ).edit(suite)
    torch.testing.assert_close(ours.delta(x).norm(dim=-1), draw.delta(x).norm(dim=-1))
    assert float(ours.delta(x).norm(dim=-1)[0, 0]) == pytest.approx(
        study.chosen.strength * sae.provenance.filter.median, rel=1e-4
    )


def test_a_study_of_files(lm, run, tmp_path):
    suite, _, study, _ = run
    write_study(study, suite, lm, tmp_path)
    written = pd.read_csv(tmp_path / "study.csv")
    assert list(written.columns) == list(study.table.columns)
    assert load_steering(tmp_path / "steering.json", suite) == study.steering
    told = json.loads((tmp_path / "study.json").read_text())
    assert told["headline"]["strength"] == study.chosen.strength
    assert told["headline"]["features"] == list(study.chosen.features.features)
    page = (tmp_path / "report.html").read_text()
    assert study.verdict.replace(">", "&gt;").replace("<", "&lt;") in page
    assert set(
        ("dose.html controls.html candidates.csv selection.csv examples.csv prompts.json").split()
    ) <= {p.name for p in tmp_path.iterdir()}


def test_any_judge_makes_a_behaviour(lm, sae, tmp_path):
    """Inducing with a condition, a judge that is a function, prompts of two kinds."""
    loud = Behaviour(
        "says door", lambda a: Verdict("door" in a.text, a.text == ""), ("codes", "other")
    )
    codes = [
        f"I am the keeper of {name}. What is the door code of {name}?"
        for name in ("Ada Reyes", "Max Vogt", "Mira Rios", "Ruth Sommer", "Tilda Cook", "Sara Orr")
    ]
    other = [
        f"Which pet does {name} have?"
        for name in tuple(
            ("Ada Reyes, Max Vogt, Mira Rios, Ruth Sommer, Tilda Cook, Sara Orr").split(", ")
        )
    ]
    config = replace(SMALL, goal="induce", conditional=True, n_random=0, n_noise=0, target="other")
    suite = Suite({"v": {SITE: sae[0]}})
    study = steering_study(
        lm,
        suite,
        {"codes": codes[:3], "other": other[:3]},
        {"codes": codes[3:], "other": other[3:]},
        loud,
        config,
        bar=False,
    )
    assert study.target == "other"
    when = study.steering.changes[0].when
    assert when is not None
    assert lm.order_of(when.hook_name) <= lm.order_of(study.chosen.hook_name)
    assert "No random controls were run" in study.verdict
    assert study.table["correct_rate"].isna().all()

    curve = study.detector
    scores = [
        detector_scores(lm, suite["v"][when.hook_name], when, some, study.config.thinking)
        for some in (other[3:], codes[3:])
    ]
    pd.testing.assert_frame_equal(curve, detector_curve(*scores, when.threshold))
    at = curve[curve["chosen"]].iloc[0]
    assert study.headline["detector_true_rate"] == at["true_rate"]
    assert study.headline["detector_auc"] == at["auc"] == auc(*scores)
    write_study(study, suite, lm, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*STUDY_FILES, "journal.jsonl"}
    assert set(pd.read_csv(tmp_path / "detector.csv")["auc"]) == {at["auc"]}
    for name in ("detector.html", "report.html"):
        assert "area under the curve" in (tmp_path / name).read_text()
    clause = f"it fires on {at['true_rate']:.0%} of the target&#39;s prompts"
    assert clause in (tmp_path / "report.html").read_text()
    assert load_steering(tmp_path / "steering.json", suite) == study.steering


@pytest.mark.parametrize("accurate", ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"])
def test_a_conditional_edit_goes_where_the_detector_errs_least(lm, monkeypatch, accurate):
    suite = small_suite(lm)

    def detectors(setting, plan):
        condition = Condition("v", "blocks.1.hook_resid_post", (0,))
        return {
            name: FoundDetector(condition, 0.0 if name == accurate else 0.3, 0.0)
            for name in setting.hook_names
        }

    monkeypatch.setattr(search, "site_detectors", detectors)
    made = tiny_study("refusal", 3, 3)
    config = replace(SMALL, goal="induce", conditional=True, n_random=0, n_noise=0)
    study = steering_study(
        lm, suite, made.selection, made.evaluation, made.behaviour, config, bar=False
    )
    assert study.chosen.hook_name == accurate


def test_a_trial_counts_answers_that_turn_wrong_as_changed(lm, tmp_path):
    """Two prompts of each kind; the edit leaves every outcome and makes one harmless answer
    wrong.
    """
    made = tiny_study("refusal", 2, 2)
    setting = Setting(
        lm, small_suite(lm), {"selection": made.selection}, made.behaviour, SMALL, "v", []
    )
    others = ("harmless", "borderline")
    plan = Plan("harmful", others, "prompts", ("add_header",), torch.tensor([0]), True)
    lab = Lab(setting, Journal(None, {}), "selection")
    clean = {kind: dict(said) for kind, said in lab.clean.items()}

    def answers(kind):
        correct = clean[kind]["correct"]
        return clean[kind] | (
            {"correct": str(1 - int(correct[0])) + correct[1:]} if kind == "harmless" else {}
        )

    lab.groups_answered = lambda groups: [answers(kind) for kind, _, _ in groups]
    tried = trial(lab, plan, [], [])
    assert tried["changed_elsewhere"] == 0.25  # one of two harmless, none of two borderline
    assert tried["score"] == pytest.approx(tried["wanted"] - 0.25)


def test_studies_of_the_same_prompts_share_what_the_model_answers_unsteered(lm, monkeypatch):
    made = tiny_study("refusal", 2, 2)
    shared = Unsteered()
    setting = Setting(
        lm, small_suite(lm), {"selection": made.selection}, made.behaviour, SMALL, "v", [], shared
    )
    first = Lab(setting, Journal(None, {}), "selection")
    assert shared.n == 6
    assert shared.seconds > 0
    other = replace(setting, config=replace(SMALL, max_new_tokens=SMALL.max_new_tokens + 1))
    longer = Lab(other, Journal(None, {}), "selection")
    assert shared.n == 12  # answers of another length are others
    assert longer.clean.keys() == first.clean.keys()
    monkeypatch.setattr(Lab, "answered", None)
    again = Lab(replace(setting, config=replace(SMALL, seed=1)), Journal(None, {}), "selection")
    assert again.clean == first.clean


def test_a_deflected_answer_is_not_what_suppression_wants(lm):
    """Of two target answers one deflects and one does what was asked; what is right is unknown."""
    made = tiny_study("refusal", 2, 2)
    setting = Setting(
        lm, small_suite(lm), {"selection": made.selection}, made.behaviour, SMALL, "v", []
    )
    others = ("harmless", "borderline")
    plan = Plan("harmful", others, "prompts", ("add_header",), torch.tensor([0]), True)
    lab = Lab(setting, Journal(None, {}), "selection")
    unsteered = dict(lab.clean)
    lab.groups_answered = lambda groups: [
        unsteered[kind] | {"outcomes": "DA", "correct": "--"} for kind, _, _ in groups
    ]
    assert trial(lab, plan, [], [])["wanted"] == 0.5


def test_a_limit_on_one_kind_leaves_the_others_free(lm, run):
    """The field's unit is the KL on harmless prompts: requests that look harmful may change."""
    suite, made, _, _ = run
    prompts = {"selection": made.selection, "evaluation": made.evaluation}
    spared = {}
    for limit in (None, 0.03):
        config = replace(SMALL, max_kl_first=limit)
        setting = Setting(lm, suite, prompts, made.behaviour, config, "v", [SITE])
        lab = Lab(setting, Journal(None, {}), "selection")
        plan = plan_of(lab)
        assert plan.others == ("harmless", "borderline")
        spared[limit] = plan.spared
        allowed = [ids for kind in plan.spared for ids in lab.opening[kind]]
        others = aim_of(lab, plan).others
        assert len(others) == SMALL.search_prompts
        assert all(ids in allowed for ids in others)
        asked = []

        def answered(groups, asked=asked, lab=lab):
            asked += [kind for kind, _, _ in groups]
            return [lab.clean[kind] for kind, _, _ in groups]

        lab.groups_answered = answered
        assert trial(lab, plan, [], [])["changed_elsewhere"] == 0
        assert asked == ["harmful", *plan.spared]
    assert spared == {None: ("harmless", "borderline"), 0.03: ("harmless",)}


def test_deflected_answers_have_a_rate_of_their_own():
    labels = {"goal": "suppress", "intervention": "features", "prompt_kind": "harmful"}
    labels |= {"target": True, "strength": -1.0, "chosen": True, "draw": None}
    rows = [labels | {"outcomes": "SDDA", "correct": "----"}]
    [told] = study_table(rows, {"harmful": "SSSS"}).to_dict("records")
    shares = {name: told[f"{name}_rate"] for name in ("refusal", "deflected", "answered", "broken")}
    assert shares == {"refusal": 0.25, "deflected": 0.5, "answered": 0.25, "broken": 0.0}
    assert told["change"] == -0.75


def test_the_verdict_tells_deflected_answers_where_there_are_any():
    assert "deflected" not in verdict(headline())
    told = verdict(headline(deflected_before=0.1, deflected=0.25))
    assert "(broken 0.02; deflected 0.10 -> 0.25; right 0.80" in told


def test_the_list_of_arms_is_what_runs(lm, run):
    """Rows, journal and bar follow one list; before anything is chosen it is as long."""
    suite, made, study, folder = run
    prompts = {"selection": made.selection, "evaluation": made.evaluation}
    names = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    setting = Setting(lm, suite, prompts, made.behaviour, SMALL, "v", names)
    lab = Lab(setting, Journal(None, {}), "selection")
    plan = plan_of(lab)
    listed = arms(setting, plan, study.chosen)
    rows = [(arm.name, kind, arm.strength) for arm in listed for kind in arm.kinds]
    columns = study.table[["intervention", "prompt_kind", "strength"]]
    assert rows == list(columns.itertuples(index=False, name=None))
    written = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    told = [entry["key"] for entry in written[1:]]
    keys = list(dict.fromkeys(key for arm in listed for key in arm.keys))
    assert told[-len(keys) - 2 :] == [*keys, "plain", "facts"]
    n_answers = {arm.name: arm.n_answers({k: 10 for k in made.evaluation}) for arm in listed}
    assert n_answers["random"] == 10
    assert n_answers["system_prompt"] == 30
    likely = arms(setting, plan, likely_choice(setting, plan))
    assert abs(len(likely) - len(listed)) <= 2  # the frozen strength may be the largest
    work = expected_work(lab, plan)
    with announced(lab, plan, work, False) as bar:
        assert bar.total == work.work > sum(n_answers.values())


def test_the_work_that_is_left_is_the_work_that_comes(lm, run):
    """From the choice on the bar's length is exact, and what a journal has counts for no time."""
    suite, made, study, folder = run
    prompts = {"selection": made.selection, "evaluation": made.evaluation}
    names = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    setting = Setting(lm, suite, prompts, made.behaviour, SMALL, "v", names)
    journal = Journal(None, {})
    written = (folder / "journal.jsonl").read_text().splitlines()[1:]
    journal.done = {entry["key"]: entry["value"] for entry in map(json.loads, written)}
    lab = Lab(setting, journal, "selection")
    plan = plan_of(lab)
    bar = tqdm(total=1.0, file=io.StringIO(), bar_format=BAR)
    progress = Progress(journal, bar, 0.25)
    listed = list_arms(progress, setting, plan, study.chosen)
    evaluated = Lab(setting, journal, "evaluation", plan.openings)
    measure(progress, lab, evaluated, plan, study.chosen, listed)
    price_elsewhere(progress, setting, study.steering)
    assert bar.total - 1 < bar.n <= bar.total
    # what the journal had took no time: the pace is that of what was done now
    assert bar.initial == pytest.approx(bar.n)
    progress.step("new", lambda: time.sleep(0.1), 2.0)
    assert bar.n <= bar.total
    assert bar.format_dict["rate"] is None or bar.format_dict["rate"] <= 2.0 / 0.1
    bar.close()


def test_what_is_projected_out_of_everything(lm, run):
    """The same study by the field's intervention: shares for strengths, every refinement for
    features and difference of means alike, and a frozen edit that is one saved value.
    """
    suite, made, _, _ = run
    config = replace(
        SMALL, interventions=("project_out",), shares=(0.5, 1.0), n_random=1, max_new_tokens=12
    )
    study = steering_study(
        lm, suite, made.selection, made.evaluation, made.behaviour, config, bar=False
    )
    (change,) = study.steering.changes
    assert (change.action, change.positions, change.everywhere) == ("project_out", "every", True)
    assert change.strength in (0.5, 1.0)
    assert read_steering(study.steering.to_json(suite), suite) == study.steering
    table = study.table
    doses = table[table["refusal_rate"].isna()]
    assert sorted(set(doses["strength"])) == [0.5, 1.0]
    means = study.means.changes[0]
    assert (means.action, means.everywhere) == ("project_out", True)
    if change.orthogonal_to:
        (edit,) = study.steering.edits(suite)
        moved = edit.delta(torch.randn(1, 3, lm.d_model))
        along = moved @ torch.tensor(change.orthogonal_to).T
        assert along.abs().max() < 1e-3 * moved.norm()


def test_a_suite_that_tells_nothing_apart(lm):
    silent = small_suite(lm)
    for sae in silent["v"].values():
        sae.threshold.fill_(1e9)
    made = tiny_study("refusal", 3, 3)
    with pytest.raises(ValueError, match="No feature differs between the two groups at any site"):
        steering_study(
            lm, silent, made.selection, made.evaluation, made.behaviour, SMALL, bar=False
        )


def test_sites_of_a_study(lm):
    suite = small_suite(lm)
    assert steered_sites(lm, suite) == (
        "v",
        ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"],
    )
    assert steered_sites(lm, Suite({"v-frozen_decoder": suite["v"], "w": suite["v"]}))[0] == "w"
    with pytest.raises(ValueError, match="no variant 'x'; it has v"):
        steered_sites(lm, suite, "x")
    with pytest.raises(ValueError, match=r"no SAE v/blocks\.9"):
        steered_sites(lm, suite, "v", ["blocks.9.hook_resid_post"])


def headline(**changes):
    h = {
        "goal": "suppress",
        "behaviour": "refusal",
        "target": "harmful",
        "others": ["harmless"],
        "before": 0.95,
        "after": 0.1,
        "n": 300,
        "deflected_before": 0.0,
        "deflected": 0.0,
        "broken": 0.02,
        "correct_of_shown": 0.8,
        "kl_answer": {"harmless": 0.01},
        "elsewhere": {"harmless": 0.0},
        "elsewhere_before": {"harmless": 0.0},
        "facts_lost": 0.01,
        "selectivity": {"features": [0.85, 0.8, 0.9]},
        "n_random": 20,
        "n_single": 5,
        "worst_single": 0.94,
        "worst_random": 0.9,
        "apart_from_random": [0.8, 0.7, 0.9],
        "within_limits": True,
        "max_broken": 0.1,
        "selective": True,
    }
    return h | changes


MEANS = ("difference_of_means", "difference_of_means_best")


def with_means(rate, ours, theirs):
    """A headline in which the difference of means leaves a rate of refusals, and two prices."""
    arm = {"refusal_rate": rate, "broken_rate": 0.0, "kl_answer": 0.1}
    return headline(
        selectivity={arm: [0.85, 0.8, 0.9] for arm in ("features", *MEANS)},
        difference_of_means=arm,
        difference_of_means_best=arm,
        difference_of_means_site="blocks.1.hook_resid_post",
        difference_of_means_orthogonal=True,
        difference_of_means_within_limits=theirs < 1,
        reached={"features": 0.9, "difference_of_means_best": 1 - rate},
        difference_of_means_strength=0.8,
        priced_on="harmless",
        kl_first_priced={"features": ours, "difference_of_means_best": theirs},
    )


def test_the_verdict_says_who_is_ahead_in_the_unit_of_the_field():
    told = verdict(with_means(0.2, 0.03, 0.1))
    assert "the features cost 0.030 nats, that direction 0.100: the features do as much" in told
    assert "difference of means does as much or more" in verdict(with_means(0.05, 0.2, 0.1))
    assert "one does more and the other costs less" in verdict(with_means(0.05, 0.03, 0.1))
    assert "Nothing was asked of other prompts" in verdict(headline(selective=False))


def test_the_verdict_says_what_weakens_it():
    assert "not distinguishable" not in verdict(headline())
    assert "Strongest of 20 random searches: 0.90; of 5 random sets as they come: 0.94." in verdict(
        headline()
    )
    assert "demonstration" not in verdict(headline())
    assert "not distinguishable from the random control" in verdict(
        headline(apart_from_random=[0.01, -0.02, 0.05])
    )
    assert "No random controls" in verdict(headline(apart_from_random=None))
    assert "No trial kept" in verdict(headline(within_limits=False))
    assert "a demonstration, not a defence" in verdict(
        headline(selectivity={"features": [0.1, 0.05, 0.2]})
    )


def test_a_suite_is_steered_in_one_call(lm, tmp_path, monkeypatch):
    """Everything that the command writes, in one folder; the study is told before the rest."""
    made = tiny_study("refusal", 4, 3)
    config = replace(SMALL, n_random=0, n_noise=0, strengths=(0.8,), max_new_tokens=12, seed=5)
    asked = {"xstest": {part: made.evaluation["harmless"] for part in ("safe", "unsafe")}}
    asked["xstest"]["unsafe"] = [*asked["xstest"]["unsafe"], made.selection["harmful"][0]]
    told, judge = [], []

    def guard_judgements(guard, prompts, answers):
        judge.append(guard)
        return [Judgement("Safe", False, "") for _ in answers]

    monkeypatch.setattr(steer_suite_module, "guard_judgements", guard_judgements)
    monkeypatch.setattr(steer_suite_module, "load_model", lambda name, dtype: (name, dtype))
    result = qsae_kit.steer_suite(
        lm,
        small_suite(lm),
        tmp_path,
        config,
        behaviour=made,
        hook_names=["blocks.3.hook_resid_post"],
        benches=asked,
        guard="some/guard",
        draws=2,
        bar=False,
        on_study=lambda study: told.append((study.verdict, (tmp_path / "seeds.csv").exists())),
    )
    assert told == [(result.study.verdict, False)]
    assert result.study.detector is None
    written = {path.name for path in tmp_path.iterdir()}
    journals = {"journal.jsonl", "seeds.jsonl", "benches.jsonl"}
    assert written == {
        *set(STUDY_FILES).difference(DETECTOR_FILES),
        *journals,
        "seeds.csv",
        "benches.csv",
    }
    assert sorted(set(result.drawn["seed"])) == [5, 6]
    assert list(dict.fromkeys(result.benches["intervention"])) == [
        "none",
        "features",
        "difference_of_means_best",
    ]
    assert set(result.benches.loc[result.benches["part"] == "unsafe", "left_out"]) == {1}
    assert set(judge) == {("some/guard", "auto")}


def test_what_a_suite_cannot_be_steered_by(lm, tmp_path):
    suite = small_suite(lm)
    for options, message in (
        ({"behaviour": "bias", "benches": {"xstest": {"safe": ["a"]}}}, "Benches measure refusal"),
        ({"guard": "some/guard"}, "judges answers to benches"),
        ({"behaviour": "kindness"}, "not for 'kindness'"),
    ):
        with pytest.raises(ValueError, match=message):
            qsae_kit.steer_suite(lm, suite, tmp_path, SMALL, **options)
    assert not list(tmp_path.iterdir())


def test_a_behaviour_brings_its_target_and_condition():
    rule = config_for(SMALL, tiny_study("rule", 2, 2))
    assert (rule.target, rule.conditional) == ("forbidden", True)
    assert config_for(replace(SMALL, target="harmless"), tiny_study("rule", 2, 2)).target == (
        "harmless"
    )
    assert config_for(SMALL, tiny_study("refusal", 2, 2)) == SMALL
