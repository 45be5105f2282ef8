"""The steering study; `steps` is its outline.

`config` how it is run, `lab` what every measurement needs, `search` features at a site, `trials`
site and strength, `chosen` what was decided, `arms` what is measured, `measure` the measuring,
`findings` rows as table and verdict.
"""

from qsae_kit.steer.study.arms import CONTROL_SAES
from qsae_kit.steer.study.config import StudyConfig, quick
from qsae_kit.steer.study.lab import Unsteered
from qsae_kit.steer.study.steps import JOURNAL, STUDY_FILES, StudyResult, steering_study

__all__ = [
    "CONTROL_SAES",
    "JOURNAL",
    "STUDY_FILES",
    "StudyConfig",
    "StudyResult",
    "Unsteered",
    "quick",
    "steering_study",
]
