"""Shared fixtures. Shapes in annotations are checked by beartype here, and only here."""

import os

# Workers of pytest-xdist, and what they start, share the cores; set before torch is imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

from jaxtyping import config, install_import_hook

with install_import_hook("qsae_kit", "typecheck.check"):
    import qsae_kit

import pytest
import torch


@pytest.fixture(scope="session")
def lm() -> "qsae_kit.HookedLM":
    """The bundled model."""
    return qsae_kit.load_model("tiny")


@pytest.fixture(autouse=True)
def _no_hooks_left(request):
    """Every test leaves the bundled model without a hook, on its hook points and on the HF
    modules.
    """
    yield
    if "lm" in request.fixturenames:
        model = request.getfixturevalue("lm")
        assert not model.list_hooks()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.fixture(autouse=True)
def _gradients_stay_on():
    """An interrupt within torch's own `no_grad` leaves gradients off: no test hands that to the
    next.
    """
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def unchecked():
    """Switches the type checks off, for tests of what a user without them is told."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
