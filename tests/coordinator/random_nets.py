"""Networks made up at random from the blocks that the tracer claims to know."""

import torch
from hypothesis import strategies as st
from prunable_nets import Attention, Wired
from torch import nn
from torch.nn import functional

WIDTHS = (2, 3, 4, 6, 8)
ACTS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Identity)


class Maker:
    """Draws layers; every draw is hypothesis's, so that a failure shrinks to a small net."""

    def __init__(self, draw, axes):
        self.draw = draw
        self.axes = axes
        self.conv = (nn.Conv1d, nn.Conv2d)[axes - 1]
        self.turned = (nn.ConvTranspose1d, nn.ConvTranspose2d)[axes - 1]
        self.batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1]
        self.instance_norm = (nn.InstanceNorm1d, nn.InstanceNorm2d)[axes - 1]
        self.pools = ((nn.MaxPool1d, nn.AvgPool1d), (nn.MaxPool2d, nn.AvgPool2d))[axes - 1]
        self.mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1]

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def yes(self):
        return self.draw(st.booleans())

    def width(self):
        return self.pick(*WIDTHS)

    def act(self):
        return self.pick(*ACTS)()

    def norm(self, width):
        kind = self.pick("batch", "batch", "batch", "none", "instance", "group", "scale")
        if kind == "batch":
            return self.batch_norm(width, affine=self.yes())
        if kind == "instance":
            return self.instance_norm(width, affine=True)
        if kind == "group":
            return nn.GroupNorm(self.pick(*divisors(width)), width)
        if kind == "scale":
            shape = (width, *(1,) * self.axes)
            return Wired(lambda m, x: x * m.scale, scale=nn.Parameter(torch.ones(shape)))
        return nn.Identity()

    def basic(self, i, o, *, groups=1, kernel=3, end=True):
        """Convolution, norm, activation; the positions stay."""
        layers = [self.conv(i, o, kernel, padding=kernel // 2, groups=groups, bias=self.yes())]
        layers += [self.norm(o), *([self.act()] if end else [])]
        return nn.Sequential(*layers)

    # Blocks: from the number of channels to a layer and the number of channels behind it.

    def plain(self, i):
        o = self.width()
        return self.basic(i, o, kernel=self.pick(1, 3)), o

    def residual(self, i):
        body = nn.Sequential(self.basic(i, self.width()))
        wide = body[0][0].out_channels
        body.append(self.basic(wide, i, end=False))
        return Wired(lambda m, x: torch.relu(x + m.body(x)), body=body), i

    def projected(self, i):
        o = self.width()
        net = Wired(
            lambda m, x: m.act(m.a(x) + m.b(x)),
            a=self.basic(i, o, end=False),
            b=self.basic(i, o, kernel=1, end=False),
            act=self.act(),
        )
        return net, o

    def separable(self, i):
        o = self.width()
        return nn.Sequential(self.basic(i, i, groups=i), self.basic(i, o, kernel=1)), o

    def multiplied(self, i):
        """Depthwise with several filters per channel."""
        times = self.pick(2, 3)
        return self.basic(i, i * times, groups=i), i * times

    def grouped(self, i):
        groups = self.pick(*divisors(i))
        o = groups * self.pick(1, 2, 3)
        return self.basic(i, o, groups=groups), o

    def inverted(self, i):
        wide = i * self.pick(1, 2)
        body = nn.Sequential(
            self.basic(i, wide, kernel=1),
            self.basic(wide, wide, groups=wide),
            self.basic(wide, i, kernel=1, end=False),
        )
        return Wired(lambda m, x: x + m.body(x), body=body), i

    def concat(self, i):
        a, b = self.width(), self.width()
        keep = self.yes()
        net = Wired(
            lambda m, x: torch.cat([m.a(x), m.b(x), *([x] if keep else [])], 1),
            a=self.basic(i, a),
            b=self.basic(i, b, kernel=1),
        )
        return net, a + b + (i if keep else 0)

    def squeeze(self, i):
        inner = self.width()
        convs = self.yes()
        axes = tuple(range(2, self.axes + 2))
        down, up = (
            (self.conv(i, inner, 1), self.conv(inner, i, 1))
            if convs
            else (nn.Linear(i, inner), nn.Linear(inner, i))
        )

        def wiring(m, x):
            gate = torch.sigmoid(m.up(torch.relu(m.down(x.mean(axes, keepdim=convs)))))
            return x * (gate if convs else gate.reshape(*gate.shape, *(1,) * len(axes)))

        return Wired(wiring, down=down, up=up), i

    def split(self, i):
        """Half of the channels goes through a convolution, and both halves meet again."""
        if i % 2:
            return self.plain(i)
        together = self.pick("cat", "add", "mul")

        def wiring(m, x):
            a, b = x.chunk(2, 1)
            a = m.body(a)
            if together == "cat":
                return torch.cat([a, b], 1)
            return a + b if together == "add" else a * torch.sigmoid(b)

        body = self.basic(i // 2, i // 2)
        return Wired(wiring, body=body), i if together == "cat" else i // 2

    def gated(self, i):
        o = self.width()
        return nn.Sequential(self.basic(i, 2 * o, end=False), nn.GLU(1)), o

    def pooled(self, i):
        return self.pick(*self.pools)(2, 1), i

    def reweighted(self, i):
        """One weight per position, from all channels."""
        net = Wired(lambda m, x: x * torch.sigmoid(m.gate(x)), gate=self.conv(i, 1, 1))
        return net, i

    def transposed(self, i):
        groups = self.pick(*divisors(i)) if self.yes() else 1
        o = groups * self.pick(1, 2, 3)
        return nn.Sequential(self.turned(i, o, 2, groups=groups), self.act()), o

    def mixed(self, i):
        """What reads all channels at once: they must stay."""
        kinds = ("softmax", "mean", "shuffle", "flip", "slices", "sum")
        kind = self.pick(*kinds, *(["layer norm"] if i > 3 else []))

        def wiring(m, x):
            if kind == "softmax":
                return x.softmax(1)
            if kind == "mean":
                return x - x.mean(1, keepdim=True)
            if kind == "sum":
                return x / (1 + x.abs().sum(1, keepdim=True))
            if kind == "flip":
                return x.flip(1) * x
            if kind == "slices":
                return torch.cat([x[:, 1:], x[:, :1]], 1)
            if kind == "shuffle":
                return functional.channel_shuffle(x, m.groups)
            return m.norm(x.transpose(1, -1)).transpose(1, -1)

        net = Wired(wiring, norm=nn.LayerNorm(i))
        net.groups = self.pick(*divisors(i))
        return net, i

    def layer(self, wide):
        """A layer of a transformer, (n, positions, wide) to the same shape."""
        heads = self.pick(1, 2, 3, 4)
        kind = self.pick("own", "own", "torch", "encoder")
        if kind == "encoder" and wide % heads == 0:
            return nn.TransformerEncoderLayer(
                wide, heads, self.width(), 0.0, batch_first=True, norm_first=self.yes(),
                activation=self.pick("relu", "gelu"),
            )  # fmt: skip
        if kind == "torch" and wide % heads == 0:
            attention = nn.MultiheadAttention(wide, heads, batch_first=True, bias=self.yes())
            body = Wired(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention)
        else:
            body = Attention(wide, heads, self.pick(1, 2, 3), self.pick("one", "three", "chunks"))
        norm = nn.LayerNorm(wide) if self.yes() else nn.Identity()
        mlp = self.width()
        hidden = nn.Sequential(nn.Linear(wide, mlp), self.act(), nn.Linear(mlp, wide))
        skip = self.yes()

        def wiring(m, x):
            y = m.body(m.norm(x)) + (x if skip else 0)
            return y + m.hidden(m.norm(y))

        return Wired(wiring, body=body, hidden=hidden, norm=norm)

    def net(self):
        """A whole classifier, and the shape of its input."""
        inputs = self.pick(1, 2, 3, 4)
        size = (5,) if self.axes == 1 else (5, 4)
        width = inputs
        blocks = []
        kinds = (
            self.plain, self.plain, self.residual, self.projected, self.separable,
            self.multiplied, self.grouped, self.inverted, self.concat, self.squeeze, self.split,
            self.gated, self.pooled, self.reweighted, self.transposed, self.mixed,
        )  # fmt: skip
        for _ in range(self.draw(st.integers(1, 5))):
            block, width = self.pick(*kinds)(width)
            blocks.append(block)
        head = self.pick("pool", "flatten", "tokens")
        if head == "tokens":
            wide = self.pick(4, 6, 8)  # of two, a LayerNorm leaves signs, and gradients of rounding
            last = Wired(
                lambda m, x: m.fc(m.layers(m.embed(x.flatten(2).transpose(1, 2))).mean(1)),
                embed=nn.Linear(width, wide),
                layers=nn.Sequential(*(self.layer(wide) for _ in range(self.pick(1, 2)))),
                fc=nn.Linear(wide, 3),
            )
        else:
            pool = [self.mean(1)] if head == "pool" else []
            with torch.no_grad():
                body = nn.Sequential(*blocks, *pool, nn.Flatten()).eval()
                features = body(torch.zeros(1, inputs, *size)).shape[1]
            hidden = self.width()
            last = nn.Sequential(*pool, nn.Flatten(), nn.Linear(features, hidden), self.act())
            last.append(nn.Linear(hidden, 3))
        return nn.Sequential(*blocks, last), (inputs, *size)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def random_nets(draw):
    """A network and the shape of one sample."""
    torch.manual_seed(draw(st.integers(0, 3)))
    return Maker(draw, draw(st.sampled_from([1, 2]))).net()
