"""Every law holds for every loss of torch.nn, and for drawn models."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lossloop as ll
from lossloop import testing
from lossloop._losses import _RULES

LAWS = {
    name: getattr(testing, name)
    for name in testing.__all__
    if name.startswith("check_")
}
SAMPLES = 8


class Head(nn.Module):
    """Turns numbers into what a loss takes, whatever its parameters become."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        # No multiples of 1/8, so that no example lies where a loss has a kink.
        self.scale = nn.Parameter(torch.tensor(1.0137))
        self.shift = nn.Parameter(torch.tensor(0.0173))
        self.loss = type(loss)
        self.positive = isinstance(loss, nn.PoissonNLLLoss) and not loss.log_input

    def forward(self, *inputs):
        first, *others = inputs
        output = first * self.scale + self.shift
        if self.loss is nn.BCELoss:
            output = output.sigmoid()
        elif self.loss in (nn.NLLLoss, nn.KLDivLoss):
            output = (first * self.scale).log_softmax(1)
        elif self.positive:
            output = output.exp()
        elif self.loss is nn.CTCLoss:
            output = (first * self.scale).log_softmax(2).transpose(0, 1)
        elif self.loss is nn.GaussianNLLLoss and others:
            # Above eps, which bounds the value and not the gradient.
            others = [others[0] * self.shift.exp() + 0.3]
        return (output, *others) if others else output


def samples_first(loss, output, target):
    """The data with its samples in dimension 0."""
    if isinstance(loss, nn.CTCLoss):
        labels = target[0]
        assume(labels.dim() == 2)  # those all in one row cannot be cut
        if isinstance(output, tuple):
            return (output[0].transpose(0, 1), output[1]), target
        return output.transpose(0, 1), target
    return output, target


# Of each law for each loss: five examples, or in the thorough profile 500, of ten
# losses (with their options) or models, 50 each; of two, 250 each, where compiling them
# takes longer.
THOROUGH = settings().max_examples > 100
DRAWN, EACH = (10, 50) if THOROUGH else (1, 5)
COMPILED, OF_COMPILED = (2, 250) if THOROUGH else (1, 5)
# The checks draw examples of their own inside of these.
NESTED = settings(suppress_health_check=list(HealthCheck))


def check(law, goal, data):
    options = {} if law == "check_no_recompilation" else {"examples": EACH}
    if law == "check_compiled_matches_eager":
        options = {"examples": OF_COMPILED, "backend": "aot_eager"}
    if law == "check_determinism":
        options["seed"] = 1
    LAWS[law](goal, data, **options)


@pytest.mark.parametrize("kind", _RULES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("law", LAWS)
def test_the_law_holds_for_the_loss(law, kind):
    compiles = law == "check_compiled_matches_eager"

    @settings(NESTED, max_examples=COMPILED if compiles else DRAWN)
    @given(st.data())
    def holds(draw):
        loss = draw.draw(testing.torch_losses([kind]))
        data = draw.draw(testing.loss_data(loss, n=SAMPLES))
        data = samples_first(loss, *data)
        check(law, ll.supervised(Head(loss), loss), data)

    holds()


@pytest.mark.parametrize("law", LAWS)
def test_the_law_holds_for_models(law):
    compiles = law == "check_compiled_matches_eager"

    @settings(NESTED, max_examples=COMPILED if compiles else DRAWN)
    @given(testing.models(), st.integers(0, 2**32 - 1))
    def holds(model, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SAMPLES, 5, generator=generator)
        y = torch.randint(0, 3, (SAMPLES,), generator=generator)
        check(law, ll.supervised(model, nn.CrossEntropyLoss()), (x, y))

    holds()
