"""Sparse autoencoders for chat models: hooks, training, evaluation and steering, from a notebook."""

from qsae_kit.attach import calibrate
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import LiveRows, StoredRows
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.explain import explain, openai_chat
from qsae_kit.features.index import FeatureIndex, load_index
from qsae_kit.features.indexing import IndexConfig, build_index
from qsae_kit.figures.basic import controls_figure, dose_figure, reconstruction_figure, training_figure
from qsae_kit.figures.frontiers import (
    baseline_figure,
    concept_figure,
    frontier_figure,
    needed_l0_figure,
    recovery_by_frequency_figure,
    scaling_figure,
)
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM, load_model
from qsae_kit.metrics.scaling import fit_scaling
from qsae_kit.pipelines.demo import DemoConfig, default_config, run_demo
from qsae_kit.sae.releases import inspect_suite
from qsae_kit.sae.store import convert_suite, load_sae, load_suite, save_sae, save_suite
from qsae_kit.sites import Site
from qsae_kit.steer.answers import answer_pair, token_table
from qsae_kit.steer.behaviours import Behaviour, refusal, tiny_study
from qsae_kit.steer.changes import (
    Change,
    Condition,
    Steering,
    ablate_features,
    add_direction,
    add_features,
    clamp_features,
    load_steering,
)
from qsae_kit.steer.study import StudyConfig, steering_study
from qsae_kit.train.fit import sites_of
from qsae_kit.train.recipe import TrainConfig, default_recipe
from qsae_kit.train.run import train_saes
from qsae_kit.train.watch import LiveFigure, read_log
from qsae_kit.widgets import FeatureExplorer, LayerLoss, SteeringLab, TokenActivations, TrainingMonitor

__all__ = [
    "Behaviour", "Change", "Condition", "DemoConfig", "Edit", "FeatureExplorer", "FeatureIndex", "HookedLM", "IndexConfig", "LayerLoss",
    "LiveFigure", "LiveRows", "Site", "Steering", "SteeringLab", "StoredRows", "StudyConfig", "TokenActivations",
    "TrainConfig", "TrainingMonitor", "ablate_features", "add_direction", "add_features", "answer_pair", "applied",
    "baseline_figure", "build_index", "calibrate", "clamp_features", "concept_figure", "controls_figure", "convert_suite", "default_config", "default_recipe", "dose_figure",
    "evaluate_suite", "explain", "fit_scaling", "frontier_figure", "inspect_suite", "load_index", "load_model", "load_sae", "load_steering",
    "load_suite", "needed_l0_figure", "openai_chat", "read_log", "reconstruction_figure", "recovery_by_frequency_figure", "refusal",
    "run_demo", "save_sae", "save_suite", "scaling_figure", "sites_of", "steering_study", "tiny_study", "token_batches", "token_table",
    "train_saes", "training_figure",
]  # fmt: skip
