"""Small networks of one's own, in float64, their losses, and anisotropic inputs."""

import itertools

import torch
from torch import nn

from ekfac_dist.functional import KEY, manual


def anisotropic(*shape, seed=0):
    """Gaussian inputs whose coordinates differ in size and are correlated."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    mixing = torch.diag(torch.linspace(0.2, 3, shape[-1], dtype=torch.float64))
    return randn(*shape) @ (mixing + 0.3 * randn(shape[-1], shape[-1]))


def mlp(*sizes, activation=nn.Tanh, bias=True, seed=0):
    """Linear maps with activations between them, weights larger than at initialisation."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return net


def linears(net):
    """Names of a network's linear maps, in order."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


def cross_entropy(net):
    """−log p of labels y [B] or [B, t] under net(x), one for each label."""

    def losses(x, y):
        out = net(x)
        return nn.functional.cross_entropy(
            out.reshape(-1, out.shape[-1]), y.reshape(-1), reduction="none"
        )

    return losses


class Rewritten(nn.Module):
    """Two hidden layers, whose forward is written twice: plainly, and so that it records."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.5)
        self.double()

    @manual
    def forward(self, x):
        if not hasattr(self, KEY):
            x = self.dropout(torch.tanh(self.fc1(x)))
            return self.fc3(self.dropout(torch.tanh(self.fc2(x))))
        cache = getattr(self, KEY)
        y1 = self.fc1(x)
        cache.input_hidden_pairs.append((x, y1))
        x2 = self.dropout(torch.tanh(y1))
        y2 = self.fc2(x2)
        cache.input_hidden_pairs.append((x2, y2))
        return self.fc3(self.dropout(torch.tanh(y2)))


class Mixing(nn.Module):
    """Positions [B, T, i] see the mean of those up to them; an MLP follows, of any kind."""

    def __init__(self, below, above):
        super().__init__()
        self.below, self.above = below, above

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.above(torch.tanh(self.below(x)).cumsum(1) / steps)
