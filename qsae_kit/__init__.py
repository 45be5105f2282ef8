"""Sparse autoencoders for chat models: hooks, training, evaluation and steering, from a notebook."""

from qsae_kit.activations import LiveRows, StoredRows
from qsae_kit.demo import DemoConfig, default_config, run_demo
from qsae_kit.edits import Edit, applied
from qsae_kit.evaluate import evaluate_suite
from qsae_kit.formats import load_sae, load_suite, save_sae
from qsae_kit.models import HookedLM, load_model
from qsae_kit.plots import reconstruction_figure, steering_figure, training_figure
from qsae_kit.recipe import TrainConfig, default_recipe
from qsae_kit.sites import Site
from qsae_kit.steering import ablate_features, add_direction, add_features, clamp_features
from qsae_kit.study import StudyConfig, steering_study
from qsae_kit.train import train_saes
from qsae_kit.watch import LiveFigure, read_log

__all__ = [
    "DemoConfig", "Edit", "HookedLM", "LiveFigure", "LiveRows", "Site", "StoredRows", "StudyConfig", "TrainConfig",
    "ablate_features", "add_direction", "add_features", "applied", "clamp_features", "default_config", "default_recipe", "evaluate_suite", "load_model", "load_sae", "load_suite", "read_log",
    "reconstruction_figure", "run_demo", "save_sae", "steering_figure", "steering_study", "train_saes", "training_figure",
]  # fmt: skip
