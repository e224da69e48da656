"""Which parameters decay."""

import pytest
import torch
from torch import nn

from lossloop.optim import decay_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(4), nn.LayerNorm([4, 2, 2]), nn.GroupNorm(2, 4)]
        )
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))


def names(model, groups):
    of = {id(param): name for name, param in model.named_parameters()}
    return [{of[id(param)] for param in group["params"]} for group in groups]


def test_products_decay_and_norms_and_biases_do_not():
    model = Model()
    groups = decay_groups(model, 0.1)
    decayed, kept = names(model, groups)
    assert decayed == {"embed.weight", "conv.weight"}
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert kept == trained - decayed
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    torch.optim.AdamW(groups)


def test_a_rule_of_ones_own():
    model = Model()
    groups = decay_groups(model, 0.1, decays=lambda name, param: "norms" in name)
    assert all("norms" in name for name in names(model, groups)[0])


def test_an_empty_group_is_left_out():
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize("decay", [-1.0, float("nan")])
def test_refused(decay):
    with pytest.raises(ValueError, match="at least 0"):
        decay_groups(Model(), decay)
    with pytest.raises(ValueError, match="requires_grad=True"):
        decay_groups(nn.Linear(2, 2).requires_grad_(requires_grad=False), 0.1)
