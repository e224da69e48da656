"""What all tests share: profiles of Hypothesis, one thread, a clean compiler."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "default",
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "thorough", parent=settings.get_profile("default"), max_examples=1000
)
# For mutations: that a test fails is enough, and the smallest reason is not looked for.
settings.register_profile(
    "unshrunk",
    parent=settings.get_profile("default"),
    phases=(Phase.explicit, Phase.generate),
    database=None,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Several workers share the cores; a worker with threads of its own would only wait.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_compiler():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
