"""The feature index: every figure recomputed from the model, example by example; search; labels;
cut-off builds.
"""

import copy
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from qsae_kit.data.documents import chat_prefix, token_batches
from qsae_kit.data.rows import LiveRows
from qsae_kit.features import indexing as features
from qsae_kit.features.index import load_index
from qsae_kit.features.indexing import (
    IndexConfig,
    Kept,
    build_index,
    decoder_neighbours,
    firing_together,
    hint_of,
    sample_of,
    script_of,
)
from qsae_kit.lm.chat import Phase, phases
from qsae_kit.sae import JumpReLUSAE, Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.tiny.recovery import concept_labels
from qsae_kit.world import world

SITES = ("blocks.2.hook_resid_post", "blocks.3.hook_mlp_out")
CONFIG = IndexConfig(
    tokens=6000, top=4, sampled=6, before=5, after=3, sampled_tokens=6000, batch_tokens=1024
)


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(200, seed=1_000_011))


@pytest.fixture(scope="module")
def suite(lm):
    """Not trained, but begun from data: sparse enough, and firing on everything there is."""
    source = LiveRows(lm, SITES, lambda: token_batches(lm, dialogues()))
    rows = next(iter(source.blocks(2048))).rows
    out = {"jumprelu": {}, "topk": {}}
    for (variant, architecture), name in zip(
        {"jumprelu": JumpReLUSAE, "topk": TopKSAE}.items(), SITES, strict=True
    ):
        median = float(rows[name].norm(dim=-1).median())
        # A filter that leaves some tokens out, as sinks are.
        sae = architecture(
            lm.d_model,
            300,
            9,
            Provenance(lm.model_name, name, NormFilter(median, 1.3), drop_prefix=True),
        )
        sae.init_from_rows(rows[name], torch.Generator().manual_seed(1))
        out[variant][name] = sae.requires_grad_(False)
    return out


@pytest.fixture(scope="module")
def built(lm, suite, tmp_path_factory):
    return build_index(
        lm, suite, dialogues, tmp_path_factory.mktemp("index"), CONFIG, data="the world", bar=False
    )


@pytest.fixture(scope="module")
def index(lm, suite, built):
    return load_index(built, lm, suite)


@pytest.fixture(scope="module")
def truth(lm, suite):
    """Every SAE's features of all tokens that the index saw, dialogue by dialogue, from
    run_with_cache.
    """
    batches, tokens = [], 0
    for batch in token_batches(lm, dialogues(), CONFIG.batch_tokens, seed=CONFIG.seed):
        batches.append(batch)
        tokens += int(batch.mask.sum())
        if tokens >= CONFIG.tokens:
            break
    out = {}
    for variant, saes in suite.items():
        for name, sae in saes.items():
            documents = []
            for batch in batches:
                _, cache = lm.run_with_cache(batch.ids, batch.mask)
                x = cache[name]
                counted = batch.keep & (
                    x.norm(dim=-1) <= sae.provenance.filter.factor * sae.provenance.filter.median
                )
                phase = phases(batch.ids, batch.mask, lm.markers)
                for r, n in enumerate(batch.mask.sum(1).tolist()):
                    documents.append(
                        (batch.ids[r, :n], counted[r, :n], phase[r, :n], sae.encode(x[r, :n]))
                    )
            out[variant, name] = documents
    return out


def share(some, of):
    return pytest.approx(int(some.sum()) / max(1, int(of.sum())), rel=1e-12)


@pytest.mark.parametrize("number", [0, 1])
def test_figures_equal_a_recomputation(index, truth, number):
    key = index.places()[number]
    documents = truth[key]
    _, counted, phase, f = (torch.cat(parts) for parts in zip(*documents, strict=True))
    early = torch.cat([torch.arange(len(d[0])) < 8 for d in documents])
    assert 100 < int((~counted).sum()) < len(counted) / 2
    table = index.site(key[1], key[0]).figures
    fires = (f > 0) & counted[:, None]
    for feature in np.random.default_rng(0).choice(300, 50, replace=False):
        own = fires[:, feature]
        row = table.loc[feature]
        assert row["fired"] == int(own.sum())
        assert row["density"] == share(own, counted)
        for name, members in (
            ("template", [1]),
            ("user", [2, 3]),
            ("thinking", [4]),
            ("assistant", [5]),
        ):
            inside = torch.isin(phase, torch.tensor(members)) & counted
            assert row[f"density_{name}"] == share(own & inside, inside)
        assert row["max"] == pytest.approx(float((f[:, feature] * counted).max()), rel=1e-5)
        assert row["mean"] == pytest.approx(
            float(f[own, feature].double().mean()) if own.any() else 0.0, rel=1e-5
        )
        assert row["early_share"] == share(own & early, own)
        dropped = ~counted
        assert row["dropped_share"] == share(f[dropped, feature] > 0, dropped)
        page = index.site(key[1], key[0]).page(int(feature))
        counts, _ = np.histogram(f[own, feature].double(), page.edges)
        assert sum(page.histogram) == int(own.sum())
        # at an edge rounding may decide
        assert np.abs(np.array(page.histogram) - counts).sum() <= 2


@pytest.mark.parametrize("number", [0, 1])
def test_top_examples_are_the_top_ones(index, truth, number):
    key = index.places()[number]
    site = index.at(key)
    for feature in range(0, 300, 6):
        best = sorted(
            (float((f[:, feature] * counted).max()) for _, counted, _, f in truth[key]),
            reverse=True,
        )
        top, sampled = site.examples(feature)
        assert [e.value for e in top] == pytest.approx([v for v in best[:4] if v > 0], rel=1e-5)
        for example in top + sampled:
            ids, counted, _, f = truth[key][example.document]
            start = max(0, example.pos - CONFIG.before)
            stop = min(len(ids), example.pos + CONFIG.after + 1)
            assert example.tokens == index.model.to_str_tokens(ids[start:stop])
            assert example.acts == pytest.approx(
                (f[start:stop, feature] * counted[start:stop]).tolist(), rel=1e-5, abs=1e-6
            )
            assert example.acts[example.at] == pytest.approx(example.value, rel=1e-5)
            assert example.pos == start + example.at
        fired = sum(int(((f[:, feature] > 0) & counted).sum()) for _, counted, _, f in truth[key])
        assert len(sampled) == min(6, fired)
        assert len({(e.document, e.pos) for e in sampled}) == len(sampled)


def test_sampled_examples_are_drawn_evenly():
    """Over many features that fire on the same tokens, every token is as likely, wherever it
    comes.
    """
    lots = torch.rand(40, generator=torch.Generator().manual_seed(0))
    kept = Kept(1, 5, 3, torch.device("cpu"))
    for part in lots.split(7):  # as batches come

        def places(some, part=part):
            return part[some], some, some, torch.zeros(len(some), 3)

        kept.offer(torch.zeros(len(part), dtype=torch.long), part, places)
    assert torch.equal(
        kept.key[0].sort(descending=True).values, lots.sort(descending=True).values[:5]
    )
    assert torch.equal(kept.value, kept.key)


def test_the_earlier_one_is_kept_at_a_tie():
    kept = Kept(2, 2, 1, torch.device("cpu"))

    def places(numbers):
        return lambda some: (
            torch.ones(len(some)),
            numbers[some],
            numbers[some],
            torch.zeros(len(some), 1),
        )

    kept.offer(
        torch.tensor([1, 1, 1]), torch.tensor([3.0, 3.0, 3.0]), places(torch.tensor([5, 6, 7]))
    )
    kept.offer(torch.tensor([1, 1]), torch.tensor([3.0, 4.0]), places(torch.tensor([8, 9])))
    assert kept.document[1, kept.order[1]].tolist() == [9, 5]
    # a later offer of an earlier document
    kept.offer(torch.tensor([1]), torch.tensor([4.0]), places(torch.tensor([3])))
    assert kept.document[1, kept.order[1]].tolist() == [3, 9]
    assert kept.key[0].tolist() == [0, 0]


def test_neighbours_and_logits(lm, index, suite):
    site = index.site()
    W = suite["jumprelu"][SITES[0]].W_dec
    cosines = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=-1)
    norm, unembed = lm.hf.model.norm.weight, lm.hf.lm_head.weight
    for feature in (0, 17, 299):
        page = site.page(feature)
        own = cosines[feature].clone()
        own[feature] = -2
        assert [i for i, _ in page.neighbours] == own.topk(8).indices.tolist()
        assert [c for _, c in page.neighbours] == pytest.approx(
            own.topk(8).values.tolist(), abs=1e-5
        )
        logits = (W[feature] * norm) @ unembed.T
        best = (logits - logits.mean()).topk(10)
        assert [v for _, v in page.promoted] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert page.promoted[0][0] == lm.to_str_tokens([int(best.indices[0])])[0]
        assert page.suppressed[0][1] == pytest.approx(
            float((logits - logits.mean()).min()), abs=1e-4
        )
    few = decoder_neighbours(W[:3])
    assert (few.ids[:, 2:] == -1).all()


def test_what_fires_together(index, truth):
    _, counted, _, f = (torch.cat(parts) for parts in zip(*truth[index.places()[0]], strict=True))
    fires = ((f > 0) & counted[:, None]).double()
    both, count = fires.T @ fires, fires.sum(0)
    jaccard = both / (count[:, None] + count[None] - both)
    jaccard[both < 2] = 0
    jaccard.fill_diagonal_(0)
    for feature in range(0, 300, 10):
        page = index.site().page(feature)
        best = jaccard[feature].sort(descending=True).values[:8]
        assert [v for _, v in page.together] == pytest.approx(
            [v for v in best.tolist() if v > 0], abs=1e-6
        )
        assert all(float(jaccard[feature, i]) == pytest.approx(v) for i, v in page.together)


def test_what_the_token_alone_tells(index, truth):
    """Against the rule written out token by token: the set of tokens with the best F1 on even
    dialogues, scored on odd ones.
    """
    sides = {0: [], 1: []}
    for number, (ids, counted, _, f) in enumerate(truth[index.places()[0]]):
        for i in torch.nonzero(counted & (f > 0).any(1))[:, 0].tolist():
            sides[number % 2].append((int(ids[i]), set(torch.nonzero(f[i] > 0)[:, 0].tolist())))
    table = index.site().figures
    known = 0
    for feature in range(0, 300, 5):
        fired = [sum(feature in own for _, own in side) for side in sides.values()]
        if min(fired) < 5:
            assert np.isnan(table["token_f1"][feature])
            continue
        known += 1
        rates = {
            t: np.mean([feature in own for u, own in sides[0] if u == t])
            for t, own in sides[0]
            if feature in own
        }

        def f1(side, threshold, feature=feature, rates=rates):
            said = [rates.get(t, 0) >= threshold for t, _ in sides[side]]
            hits = sum(s and feature in own for s, (_, own) in zip(said, sides[side], strict=True))
            return 2 * hits / (sum(said) + sum(feature in own for _, own in sides[side]))

        best = max(f1(0, rate) for rate in set(rates.values()))
        allowed = [
            f1(1, rate) for rate in set(rates.values()) if f1(0, rate) == pytest.approx(best)
        ]
        assert any(
            table["token_f1"][feature] == pytest.approx(value, abs=1e-9) for value in allowed
        )
    assert known > 5


def test_a_sample_of_the_tokens(lm, suite, tmp_path, monkeypatch):
    """A sample has the size that was asked for, or less where an SAE is dense, and whole rows."""
    from dataclasses import replace

    seen = []
    monkeypatch.setattr(
        features, "sample_of", lambda tally: seen.append((tally, sample_of(tally))) or seen[-1][1]
    )
    one = {"topk": suite["topk"]}
    build_index(lm, one, dialogues, tmp_path / "a", replace(CONFIG, sampled_tokens=1500), bar=False)
    monkeypatch.setattr(features, "ENTRIES", 3000)
    build_index(lm, one, dialogues, tmp_path / "b", CONFIG, bar=False)
    for (tally, sample), expected in zip(seen, (1500, 3000 / 9), strict=True):
        assert 0.5 * expected * 0.8 < len(sample.token) < 1.1 * expected
        assert (np.diff(sample.f.indptr) == 9).mean() > 0.9  # TopK: all of a token's features
        assert tally.share < 1
    assert firing_together(seen[0][1].f).ids.shape == (300, 8)


def test_search(index):
    site = index.site()
    page = site.page(int(site.figures["fired"].idxmax()))
    word = max((t for e in page.top for t in e.tokens if t.strip().isalpha()), key=len).strip()
    found = site.search(word.upper())
    hits = {
        i: sum(word.casefold() in "".join(e.tokens).casefold() for e in site.examples(i)[0])
        for i in range(300)
    }
    assert page.feature.number in found.index
    for feature, row in found.iterrows():  # a word over a window's edge counts as shown
        assert hits[feature] <= row["in_examples"] <= len(site.examples(feature)[0])
    assert set(found.index[found["in_examples"] > 0]) >= {i for i, n in hits.items() if n}
    assert found["at_peak"].le(found["in_examples"]).all()
    promoted = page.promoted[0][0]
    assert site.search(promoted).loc[page.feature.number, "in_promoted"] >= 1
    assert site.search("").empty
    assert site.search("no such text anywhere").empty
    index.label(site, 7, "  about   zebras ")
    try:
        assert site.search("ZEBRA").index.tolist() == [7]
        assert site.page(7).label == "about zebras"
        assert site.table["label"][7] == "about zebras"
    finally:
        index.label(site, 7, "")
    assert site.page(7).label == ""


def test_live_search(index, suite, lm):
    site = index.site()
    W = suite["jumprelu"][SITES[0]].W_dec
    assert site.similar(5).index[0] == 5
    assert site.similar(-W[9]).index[-1] != 9
    assert site.similar(2 * W[9]).iloc[0]["cosine"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        site.similar(torch.zeros(3))
    chat = next(dialogues())
    found = site.firing(chat, 10)
    ids = torch.tensor([lm.chat_tokens(chat, add_generation_prompt=False)])
    x = lm.run_with_cache(ids)[1][SITES[0]][0]
    counted = x.norm(dim=-1) <= 1.3 * site.sae.provenance.filter.median
    counted[: len(chat_prefix(lm))] = False
    f = site.sae.encode(x) * counted[:, None]
    assert found["max"].tolist() == pytest.approx(
        f.amax(0).sort(descending=True).values[:10].tolist(), rel=1e-4
    )
    first, second = list(islice(dialogues(), 6)), list(islice(dialogues(), 50, 55))
    told = site.separating(first, second, 300)
    f = []
    for side in (first, second):
        starts = [
            lm.to_chat(chat, add_generation_prompt=False).rindex("<|im_start|>assistant")
            for chat in side
        ]
        cut = [
            len(lm.tokenizer(lm.to_chat(chat, add_generation_prompt=False)[:at]).input_ids)
            for chat, at in zip(side, starts, strict=True)
        ]
        f.append(
            torch.stack(
                [own[at:].mean(0) for own, at in zip(site.activations(side), cut, strict=True)]
            )
        )
    assert len(told) > 5
    for feature, row in told.iterrows():
        pairs = [
            (float(a) > float(b)) + 0.5 * (float(a) == float(b))
            for a in f[0][:, feature]
            for b in f[1][:, feature]
        ]
        assert row["auc"] == pytest.approx(np.mean(pairs))
        assert row["gap"] == pytest.approx(
            float(f[0][:, feature].sqrt().mean() - f[1][:, feature].sqrt().mean()), rel=1e-4
        )
        assert row["mean_second"] == pytest.approx(
            float(f[1][:, feature].mean()), rel=1e-4, abs=1e-7
        )
    assert told["gap"].is_monotonic_decreasing
    assert (told["auc"] > 0.5).all()
    for table in (site.similar(5), found, told):  # each with its own features' figures
        own = site.figures.loc[table.index]
        assert table["density"].tolist() == own["density"].tolist()
        assert table["top_token"].tolist() == own["top_token"].tolist()
    # without an answer: all of it
    text = site.separating(["How do I thank the nurse?"], ["Hello there"])
    assert text["mean_first"].iloc[0] == pytest.approx(
        float(site.activations(["How do I thank the nurse?"])[0].mean(0)[text.index[0]])
    )
    with pytest.raises(ValueError, match="both sides"):
        site.separating(first, [])


def test_recovered_concepts_are_labels(index):
    variant, hook_name = place = index.places()[0]
    site = index.at(place)
    rows = [
        {
            "concept": concept,
            "finder": finder,
            "site": hook_name,
            "f1": f1,
            "feature": feature,
            "null_p99": 0.2,
        }
        for concept, finder, f1, feature in (
            ("c/Rome=city", "probe", 0.9, None),
            ("c/Rome=city", "ngram", 0.1, None),
            ("c/Rome=city", variant, 0.85, 7),
            ("c/Oslo=city", "probe", 0.9, None),
            ("c/Oslo=city", "ngram", 0.1, None),
            ("c/Oslo=city", variant, 0.95, 7),
            ("d/job=nurse", "probe", 0.9, None),
            ("d/job=nurse", "ngram", 0.1, None),
            ("d/job=nurse", variant, 0.5, 8),
            ("d/pet=cat", "probe", 0.9, None),
            ("d/pet=cat", "ngram", 0.1, None),
            ("d/pet=cat", "neurons", 0.9, 9),
        )
    ]
    try:
        assert index.label_all(concept_labels(pd.DataFrame(rows))) == 1
        assert index.labels_of(site) == {7: "planted: c/Oslo=city (F1 0.95)"}
    finally:
        (index.folder / "labels.jsonl").unlink()
        index.labels.clear()


def test_labels_are_merged(index, suite, built, tmp_path):
    site = index.site()
    index.label(site, 3, "three")
    index.label(site, 4, "four")
    others = [
        {"sae": site.checksum, "feature": 3, "label": "later", "when": "2999-01-01T00:00:00+00:00"},
        {
            "sae": site.checksum,
            "feature": 4,
            "label": "earlier",
            "when": "1999-01-01T00:00:00+00:00",
        },
        {
            "sae": "another",
            "feature": 4,
            "label": "of another SAE",
            "when": "2999-01-01T00:00:00+00:00",
        },
    ]
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in others))
    try:
        assert index.merge_labels(file) == 3
        assert index.merge_labels(file) == 0
        assert (site.labels[3], site.labels[4]) == ("later", "four")
        again = load_index(built)
        assert again.site().labels == site.labels
        line = json.loads((built / "labels.jsonl").read_text().splitlines()[-1])
        assert "author" not in line
        file.write_text("{}\n")
        with pytest.raises(ValueError, match="line 1, is no label"):
            index.merge_labels(file)
        with pytest.raises(ValueError, match="no file"):
            index.merge_labels(tmp_path / "none.jsonl")
        with pytest.raises(ValueError, match="501 characters"):
            index.label(site, 3, "x" * 501)
        with pytest.raises(ValueError, match="features 0 to 299"):
            index.label(site, 300, "x")
    finally:
        (built / "labels.jsonl").unlink()
        index.labels = {}


def tables(folder):
    import pyarrow.parquet as pq

    return {
        str(p.relative_to(folder)): repr(pq.read_table(p).to_pydict())
        for p in sorted(folder.rglob("*.parquet"))
    }  # NaN is NaN


def test_groups_give_the_same(lm, suite, built, tmp_path, capsys):
    """SAEs that do not fit together are indexed one after another, and an index that is there is
    replaced.
    """
    out = build_index(lm, suite, dialogues, tmp_path, CONFIG, data="the world", memory=1, bar=False)
    assert "in 2 groups" in capsys.readouterr().out
    assert tables(out) == tables(built)
    one = {"topk": suite["topk"]}
    with pytest.raises(ValueError, match=r"another feature index: suite.* \(--fresh"):
        build_index(lm, one, dialogues, tmp_path, CONFIG, data="the world", bar=False)
    assert tables(out) == tables(built)
    out = build_index(lm, one, dialogues, tmp_path, CONFIG, fresh=True, bar=False)
    assert load_index(out).places() == [("topk", SITES[1])]
    assert sorted(p.name for p in out.iterdir()) == [
        "documents.parquet",
        "index.json",
        "tables",
        "tokens.parquet",
    ]


def test_an_index_of_other_tokens_is_another_one(lm, suite, built):
    """The same weights, said to have been trained without the template."""
    other = copy.deepcopy({name: dict(saes) for name, saes in suite.items()})
    for saes in other.values():
        for sae in saes.values():
            sae.provenance = replace(sae.origin, drop_template=True)
    with pytest.raises(ValueError, match=r"another feature index: policy\.drop_template is true"):
        build_index(lm, other, dialogues, built, CONFIG, data="the world", bar=False)


@pytest.mark.parametrize(("memory", "at"), [(None, 5), (1, 10)])  # in the second of two groups
def test_a_build_that_is_cut_off_goes_on(lm, suite, built, tmp_path, monkeypatch, memory, at):
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    calls = []

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments)

    original = features.site_activations
    monkeypatch.setattr(features, "site_activations", cut)
    with pytest.raises(KeyboardInterrupt):
        build_index(
            lm, suite, dialogues, tmp_path, CONFIG, data="the world", memory=memory, bar=False
        )
    with pytest.raises(ValueError, match="holds no feature index"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match='data is "others" now and was "the world" there'):
        build_index(lm, suite, dialogues, tmp_path, CONFIG, data="others", bar=False)
    with pytest.raises(ValueError, match="looked at other dialogues"):
        build_index(
            lm,
            suite,
            lambda: islice(dialogues(), 9, None),
            tmp_path,
            CONFIG,
            data="the world",
            memory=memory,
            bar=False,
        )
    before = len(calls)
    build_index(
        lm,
        suite,
        dialogues,
        tmp_path,
        CONFIG,
        data="the world",
        memory=memory,
        bar=False,
    )
    assert tables(tmp_path) == tables(built)
    assert len(calls) - before <= (16 if memory else 8) - at + 2


def test_dialogues_that_nothing_is_shown_of_are_forgotten(lm, suite, built, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "REMEMBERED", 500)
    most = []
    original = features._Dialogues.forget
    monkeypatch.setattr(
        features._Dialogues,
        "forget",
        lambda self, *a, **k: (original(self, *a, **k), most.append(len(self.ids)))[0],
    )
    # in two groups
    out = build_index(lm, suite, dialogues, tmp_path, CONFIG, data="the world", memory=1, bar=False)
    assert len(most) > 2
    assert tables(out) == tables(built)
    assert pq.read_table(out / "documents.parquet") == pq.read_table(built / "documents.parquet")


def test_what_cannot_be_indexed(lm, suite, tmp_path):
    with pytest.raises(ValueError, match="no SAE"):
        build_index(lm, {}, dialogues, tmp_path)
    with pytest.raises(ValueError, match="no tokens"):
        build_index(lm, suite, lambda: iter(()), tmp_path, bar=False)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text('{"index": 99}')
    with pytest.raises(ValueError, match="version 99"):
        load_index(tmp_path)


def test_another_model_or_suite(lm, suite, built, index):
    with pytest.raises(ValueError, match="lacks the SAEs"):
        load_index(built, lm, {"topk": suite["topk"]})
    with pytest.raises(ValueError, match="go together"):
        load_index(built, lm)
    alone = load_index(built)
    assert not alone.live
    with pytest.raises(ValueError, match="attach"):
        alone.site().similar(3)
    with pytest.raises(ValueError, match=r"has no 'blocks\.9"):
        alone.site("blocks.9.hook_mlp_out")
    assert repr(alone).startswith("FeatureIndex('tiny', 2 SAEs, 6,")
    assert Phase.TEMPLATE == 1
    with pytest.raises(ValueError, match="features 0 to 299"):
        index.site().page(300)


def test_names_where_they_are_plain(index):
    assert hint_of(["a", "a", "b"], 0.1, 0.9) == "token: 'a', 'b'"
    assert hint_of(["a", "a", "b"], 0.1, 0.5) == ""
    assert hint_of(["<|im_end|>"] * 9, 1.0, 0.2) == "template: '<|im_end|>'"
    assert (
        hint_of(["\u4eba", "\u5927", "\u5929", "\u597d", "\u4f60", "!"], 0.0, 0.1) == "script: CJK"
    )
    assert hint_of(["\u4eba", "\u5927", "\u5929", "\u597d", "\u4f60", "a"], 0.0, 0.1) == ""
    assert hint_of([], 0.0, np.nan) == ""
    assert script_of("ab") == "LATIN"
    assert script_of("a\u4eba") == ""
    hints = index.site().figures["hint"]
    assert hints.str.startswith("template").any()
    assert (index.site().figures.loc[hints.str.startswith("token"), "token_f1"] >= 0.8).all()


def test_template_tokens_that_an_sae_was_not_trained_on_count_for_nothing(lm, suite, tmp_path):
    [(variant, saes), *_] = suite.items()
    [(name, sae), *_] = saes.items()
    figures = []
    for drop in (False, True):
        own = copy.deepcopy(sae)
        own.provenance = replace(own.provenance, drop_template=drop)
        out = tmp_path / str(drop)
        build_index(lm, {variant: {name: own}}, dialogues, out, CONFIG, bar=False)
        figures.append(load_index(out).site(name, variant).figures)
    assert figures[0]["density_template"].max() > 0
    assert not figures[1]["density_template"].fillna(0).any()
