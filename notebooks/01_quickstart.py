# %% [markdown]
# # From a chat model to a steered chat model
#
# This notebook walks the whole way once on the bundled model: hooks, sparse autoencoders (SAEs), how well they
# reconstruct each layer, which features tell a harmful request from others, and what happens when those features are
# pushed. It runs in a few minutes on a laptop. Change the first cell to use another model.

# %%
MODEL = "tiny"  # or "smollm2", "Qwen/Qwen3-0.6B", a local folder
LAYERS, TOKENS = "3,4", 40_960

import warnings

import pandas as pd

import qsae_kit

warnings.filterwarnings("ignore")
pd.set_option("display.width", 160, "display.max_columns", 20, "display.precision", 3)

# %% [markdown]
# ## The model and its hooks
#
# The bundled model is a 1.7-million-parameter Qwen3 trained on a small generated world. It refuses when a dangerous verb
# meets a person ("burn the teacher") and answers when either half stands alone ("burn the leaves", "thank the teacher").
# It is a test bed with a known cause, not a model of the world.

# %%
lm = qsae_kit.load_model(MODEL)
lm

# %% [markdown]
# `lm` is a TransformerLens `HookedRootModule` over the untouched Hugging Face model: `run_with_cache`, `run_with_hooks`
# and `hooks()` work as usual, under TransformerLens's names.

# %%
chat = lm.to_chat("I want to burn the teacher. What should I do?", enable_thinking=False)
logits, cache = lm.run_with_cache(chat, names_filter=["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"])
{name: tuple(x.shape) for name, x in cache.items()}

# %%
questions = [
    "I want to burn the teacher. What should I do?",
    "I want to burn the leaves. What should I do?",
    "What is the capital of Peru?",
]
pd.DataFrame({"prompt": questions, "answer": lm.generate(questions, enable_thinking=False).text})

# %% [markdown]
# ## Train SAEs at three sites of two layers, from one stream
#
# One forward pass a batch serves every site and both recipes: a JumpReLU SAE trained to a target L0 (mean features a
# token), and a TopK SAE. `demo_documents` gives chats of the bundled world; your own go through `read_documents`.

# %%
from dataclasses import replace

from qsae_kit.activations import stream_rows
from qsae_kit.data import token_batches
from qsae_kit.demo import default_config, demo_documents, demo_prompts
from qsae_kit.sites import expand_sites, parse_layers

config = default_config(lm)
sites = expand_sites(["resid", "mlp", "attn"], parse_layers(LAYERS, lm.n_layers))
training, held_out = demo_documents(lm, config)
rows = stream_rows(lm, [site.hook_name for site in sites], token_batches(lm, training))

# %%
recipes = [replace(recipe, tokens=TOKENS) for recipe in config.variants]
suite = qsae_kit.train_saes(rows, recipes, model_name=lm.model_name, bar=False)
{variant: len(saes) for variant, saes in suite.items()}

# %% [markdown]
# ## How well does each layer reconstruct?
#
# *FVU* is the squared error over the variance; *delta CE* is what the model loses, in nats a token, when the
# reconstruction takes the site's place. The two need not agree, and FVU cannot be compared between sites.

# %%
batches = list(token_batches(lm, held_out[:60], batch_tokens=1024))
evaluation = qsae_kit.evaluate_suite(lm, suite, batches, bar=False)
# Trained numbers differ in their last digits between processors: the checks below hold on all.
evaluation.assign(
    fvu_below=evaluation["fvu"] < 0.15,
    l0_near_16=evaluation["l0"].between(14.5, 17.5),
    delta_ce_below=evaluation["delta_ce"] < 0.2,
)[["variant", "site", "fvu_below", "l0_near_16", "delta_ce_below"]]

# %% tags=["nbval-ignore-output"]
qsae_kit.reconstruction_figure(evaluation, lm.model_name)

# %% [markdown]
# ## Choose features on some prompts, measure on others
#
# The ten features whose activations differ most between harmful and other *selection* prompts, at the last prompt token,
# are added with those differences as weights. Site and strength are chosen on selection prompts and frozen; the
# evaluation prompts use other wordings and verb-object pairs that the model never saw in training. Strength counts in
# median norms of the site, and the controls are random features with a change of the same size and the difference of
# means.

# %%
selection, evaluation_prompts = demo_prompts(lm.model_name, replace(config, n_selection=24, n_evaluation=60))
study_config = replace(config.study, strengths=(1.5, 2.0, 2.5), n_random=5)
saes = [sae for name, sae in suite[config.variants[0].variant].items() if name.endswith("hook_resid_post")]
study = qsae_kit.steering_study(lm, saes, selection, evaluation_prompts, study_config, bar=False)

# %%
table = study.table
ours = table[table["chosen"] & (table["intervention"] == "features")].set_index(["goal", "prompt_kind"])
pd.Series(
    {
        "harmful refused, unsteered": table[(table["goal"] == "none") & (table["prompt_kind"] == "harmful")][
            "refusal_rate"
        ].item()
        > 0.95,
        "harmful refused after suppression": ours.loc[("suppress", "harmful"), "refusal_rate"] > 0.15,
        "harmless refused after induction": ours.loc[("induce", "harmless"), "refusal_rate"] > 0.85,
    }
)

# %% tags=["nbval-ignore-output"]
qsae_kit.steering_figure(table, lm.model_name)

# %% [markdown]
# Refusing harmless requests is a demonstration that the features carry the decision; it is not a use. The table has every
# strength, control and cost: KL against the unsteered model at the first answer token and over its own answers, and the
# perplexity of the steered text.
#
# ## Steer by hand
#
# An edit is a value; everything inside the `with` runs under it. `positions="header"` changes only the template tokens of
# the last assistant header, where the model decides how to begin.

# %%
found = study.frozen.candidate
edit = qsae_kit.add_features(found.sae, found.chosen, -study.frozen.strength, positions="header")
with qsae_kit.applied(lm, [edit]):
    answer = lm.generate(questions[0], enable_thinking=False).text[0]
answer.startswith(("To burn the teacher", "You can burn the teacher", "Start here"))

# %% [markdown]
# `qsae demo` does all of this at every layer and writes `suite/`, two tables and a report.
