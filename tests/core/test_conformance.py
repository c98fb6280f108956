"""The contract holds on six learners as unlike as the course is, and on every method that the catalog finds."""

from __future__ import annotations

import pytest
from stubs.diffusion_chain import DiffusionChain
from stubs.image_network import ImageNetwork
from stubs.language_sampler import LanguageSampler
from stubs.offline_actor_critic import OfflineActorCritic
from stubs.tabular_solver import TabularSolver
from stubs.transport_solver import TransportSolver

from polrl.core.catalog import catalog, load_method
from polrl.core.conformance import ALL_CHECKS, Case, case_of

STUBS = (ImageNetwork, TabularSolver, OfflineActorCritic, LanguageSampler, TransportSolver, DiffusionChain)
METHODS = [entry.slug for entry in catalog().values() if entry.built]


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.__name__)
def test_stub(stub, check):
    check(Case(stub))


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("slug", METHODS)
def test_method(slug, check):
    check(case_of(load_method(slug)))
