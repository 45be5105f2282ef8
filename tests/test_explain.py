"""Explaining features with a language model, against a local server that speaks the chat
protocol.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from qsae_kit import build_index, explain, load_index, openai_chat
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.features.explain import marked
from qsae_kit.features.index import Example
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.world import world

SITE = "blocks.1.hook_resid_post"


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(80, seed=1_000_015))


@pytest.fixture(scope="module")
def site(lm, tmp_path_factory):
    rows = kept_rows(lm, [SITE], next(iter(token_batches(lm, dialogues(), batch_tokens=2048))))[
        SITE
    ]
    sae = TopKSAE(
        lm.d_model,
        300,
        6,
        Provenance(lm.model_name, SITE, NormFilter(float(rows.norm(dim=-1).median()))),
    )
    sae.init_from_rows(rows, torch.Generator().manual_seed(3))
    suite = {"topk": {SITE: sae.requires_grad_(False)}}
    config = IndexConfig(tokens=4000, top=5, sampled=30, before=6, after=2, batch_tokens=1024)
    return load_index(
        build_index(lm, suite, dialogues, tmp_path_factory.mktemp("i"), config, bar=False),
        lm,
        suite,
    ).site()


@pytest.fixture
def server():
    """Answers with `server.reply(content)` and keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, self.headers.get("Authorization"), asked))
            body = self.server.reply(asked["messages"][-1]["content"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                body
                if isinstance(body, bytes)
                else json.dumps({"choices": [{"message": {"content": body}}]}).encode()
            )

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def by_token(content):
    """Names the token that is marked most; then says yes where the text holds it."""
    if "between << and >>" in content:
        found = re.findall(r"<<(.+?)>>", content.split("\n\n", 1)[1])
        return f"It fires on «{max(set(found), key=found.count)}»"
    token = re.search("«(.+?)»", content)[1]
    texts = re.split(r"\n\n\d+\. ", "\n\n" + content.split("\n\n", 1)[1])[1:]
    return " ".join("1" if token in text else "0" for text in texts)


def test_an_explanation_is_scored_on_what_was_not_shown(site, server):
    server.reply = by_token
    llm = openai_chat(f"http://127.0.0.1:{server.server_port}/v1/", "a-model", key="secret")
    figures = site.figures
    feature = int(
        figures.index[
            (figures["token_f1"] > 0.95)
            & (figures["density"] < 0.1)
            & (figures["density_template"] == 0)  # whose tokens are not in every text
            & (figures["fired"] > 40)
        ][0]
    )
    found = explain(site, feature, llm, shown=8, unseen=6)
    assert found.text.startswith("It fires on")
    assert found.accuracy.rate > 0.8
    assert found.accuracy.low < found.accuracy.rate
    path, key, asked = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert asked["model"] == "a-model"
    shown = asked["messages"][0]["content"]
    assert len(found.judged) == found.n == sum(fires for _, fires, _ in found.judged) * 2
    for text, fires, _ in found.judged:
        assert not fires or text not in shown.replace("<<", "").replace(">>", "")
    # without knowing anything it is at chance
    server.reply = lambda content: (
        by_token(content) if "between" in content else " ".join(["1"] * found.n)
    )
    assert explain(site, feature, llm, shown=8, unseen=6).accuracy.rate == 0.5


def test_texts_without_the_feature(site):
    import random

    from qsae_kit.features.explain import silent

    lm = site.index.model
    feature = int((site.figures["density"] - 0.03).abs().idxmin())
    for text in silent(site, feature, 5, random.Random(0)):
        assert text
        assert lm.tokenizer(text).input_ids


def test_answers_that_cannot_be_used(site, server):
    address = f"http://127.0.0.1:{server.server_port}"
    feature = int(site.figures["fired"].idxmax())
    with pytest.raises(ValueError, match="begins with http"):
        openai_chat("file:///etc/passwd", "m")
    server.reply = lambda content: b"<html>not json"
    with pytest.raises(ValueError, match="gave no answer that could be read"):
        explain(site, feature, openai_chat(address, "m"))
    some = int(site.figures["fired"].sub(60).abs().idxmin())
    server.reply = lambda content: (
        "It is something." if "between" in content else "yes, all of them"
    )
    with pytest.raises(ValueError, match="answers of 0 or 1 were asked for"):
        explain(site, some, openai_chat(address, "m"))
    server.reply = lambda content: "  "
    with pytest.raises(ValueError, match="came back empty"):
        explain(site, some, openai_chat(address, "m"))
    dead = int(site.figures["fired"].idxmin())
    assert site.figures["fired"][dead] < 2
    with pytest.raises(ValueError, match="too few to explain"):
        explain(site, dead, lambda messages: "x")


def test_marks():
    assert marked(Example(0, 1, 4.0, ["a", "b", "c"], [1.0, 4.0, 2.0], 1)) == "a<<b>><<c>>"
