"""Targets for the tests of the command line: good ones and bad ones."""

import sys

import torch
from torch import nn

print("importing the net")


class OddError(Exception):
    """Derives from nothing that a library could know."""


class Net(nn.Module):
    def __init__(self, width=8, act="relu"):
        super().__init__()
        self.one = nn.Linear(4, width)
        self.two = nn.Linear(width, 3)
        self.act = getattr(torch, act)

    def forward(self, x):
        print("running the net")
        return self.two(self.act(self.one(x)))


class TwoInputs(Net):
    def forward(self, x, y):
        return super().forward(x + y)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.net = Net()

    def forward(self, tokens):
        assert tokens.dtype == torch.int64
        return self.net(self.table(tokens))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        if self.training:
            x = x * x
        return self.layers(x)


class Branch(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else y.exp()


class Odd(Net):
    def forward(self, x):
        raise OddError("odd\n  in forward")


class Leaves(Net):
    def forward(self, x):
        sys.exit("gone")


class Outer:
    class Inner(Net):
        pass


class Unfinished(nn.Module):
    pass


net = Net()
net.one.eval()
number = 3


def make(width):
    return Net(width)


def nothing():
    return None


def odd():
    raise OddError("two\nlines")


def silent():
    raise OddError


def leave():
    sys.exit(3)


def wide():
    raise RuntimeError("bad: " + chr(10) * 3 + "end")
