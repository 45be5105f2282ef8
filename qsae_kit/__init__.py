"""Sparse autoencoders for chat models: hooks, training, evaluation and steering, from a notebook.

Nothing heavy is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsae_kit.attach import attached, calibrate
    from qsae_kit.audit.audit_page import write_audit
    from qsae_kit.audit.auditing import Asked, AuditConfig, audit_answers
    from qsae_kit.data.documents import token_batches
    from qsae_kit.data.rows import LiveRows, StoredRows
    from qsae_kit.evaluate.evaluation import evaluate_suite
    from qsae_kit.features.explain import explain, openai_chat
    from qsae_kit.features.index import FeatureIndex, load_index
    from qsae_kit.features.indexing import IndexConfig, build_index
    from qsae_kit.figures.basic import (
        controls_figure,
        detector_figure,
        dose_figure,
        reconstruction_figure,
        training_figure,
    )
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
    from qsae_kit.sae.suites import Feature, Place, Suite
    from qsae_kit.sites import Site
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
    from qsae_kit.steer.pairs import answer_pair, token_table
    from qsae_kit.steer.steer_suite import steer_suite
    from qsae_kit.steer.study import StudyConfig, steering_study
    from qsae_kit.train.fit import sites_of
    from qsae_kit.train.recipe import TrainConfig, default_recipe
    from qsae_kit.train.run import train_saes
    from qsae_kit.train.watch import LiveFigure, read_log
    from qsae_kit.widgets import (
        Audit,
        FeatureExplorer,
        LayerLoss,
        SteeringLab,
        TokenActivations,
        TrainingMonitor,
    )

HOMES = {
    # the model
    "lm.hooked": ("HookedLM", "load_model"),
    "lm.edits": ("Edit", "applied"),
    "sites": ("Site",),
    # data
    "data.documents": ("token_batches",),
    "data.rows": ("LiveRows", "StoredRows"),
    # SAEs
    "sae.store": ("convert_suite", "load_sae", "load_suite", "save_sae", "save_suite"),
    "sae.releases": ("inspect_suite",),
    "sae.suites": ("Feature", "Place", "Suite"),
    "attach": ("attached", "calibrate"),
    # training
    "train.recipe": ("TrainConfig", "default_recipe"),
    "train.run": ("train_saes",),
    "train.fit": ("sites_of",),
    "train.watch": ("LiveFigure", "read_log"),
    # evaluation
    "evaluate.evaluation": ("evaluate_suite",),
    "metrics.scaling": ("fit_scaling",),
    "figures.basic": tuple(
        "controls_figure detector_figure dose_figure reconstruction_figure training_figure".split()
    ),
    "figures.frontiers": tuple(
        (
            "baseline_figure concept_figure frontier_figure needed_l0_figure "
            "recovery_by_frequency_figure scaling_figure"
        ).split()
    ),
    # features
    "features.indexing": ("IndexConfig", "build_index"),
    "features.index": ("FeatureIndex", "load_index"),
    "features.explain": ("explain", "openai_chat"),
    # steering
    "steer.changes": tuple(
        (
            "Change Condition Steering ablate_features add_direction add_features clamp_features "
            "load_steering"
        ).split()
    ),
    "steer.pairs": ("answer_pair", "token_table"),
    "steer.behaviours": ("Behaviour", "refusal", "tiny_study"),
    "steer.study": ("StudyConfig", "steering_study"),
    "steer.steer_suite": ("steer_suite",),
    # audit
    "audit.auditing": ("Asked", "AuditConfig", "audit_answers"),
    "audit.audit_page": ("write_audit",),
    # widgets
    "widgets": (
        "Audit",
        "FeatureExplorer",
        "LayerLoss",
        "SteeringLab",
        "TokenActivations",
        "TrainingMonitor",
    ),
    # the whole way
    "pipelines.demo": ("DemoConfig", "default_config", "run_demo"),
}
"""Module -> its public names, by stage."""
_HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"qsae_kit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
