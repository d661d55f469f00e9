"""One training step of CNP, TNP-D and ConvCNP on a line, in PyTorch: the peers of `isopleth train`.

Written from the papers (arXiv:1807.01613, arXiv:2207.04179, arXiv:1910.13556) at the sizes that the
tables of the benchmarks have: context 3 to 47 of 50 sites on [-2, 2], the rest asked. ConvCNP as
src/model/convcnp.rs has it, with one length scale each way, so that both sides compute the same.
Adam; no data are drawn while the clock runs. Prints one JSON object for each model.

    python benches/peers/family.py --models cnp convcnp convcnp-xl tnp-d
"""

import argparse
import json
import math
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--models", nargs="+", default=["cnp", "tnp-d", "convcnp", "convcnp-xl"])
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--contexts", type=int, default=25)
parser.add_argument("--targets", type=int, default=50)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(args.threads)
torch.manual_seed(args.seed)


def mlp(*widths, last=False):
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers if last else layers[:-1])


def split(raw):
    mean, sd = raw.chunk(2, -1)
    return mean, F.softplus(sd) + 1e-6


class Cnp(nn.Module):
    """Two pooled encoders of width 128 side by side, as BNP and TNP have it."""

    def __init__(self):
        super().__init__()
        self.before = nn.ModuleList(mlp(2, 128, 128, 128, 128) for _ in range(2))
        self.after = nn.ModuleList(mlp(128, 128, 128) for _ in range(2))
        self.decode = mlp(257, 128, 128, 2)

    def forward(self, xc, yc, xt):
        seen = torch.cat([xc, yc], -1)
        pooled = [b(a(seen).mean(1, keepdim=True)) for a, b in zip(self.before, self.after)]
        r = torch.cat(pooled, -1).expand(-1, xt.shape[1], -1)
        return split(self.decode(torch.cat([r, xt], -1)))


class TnpD(nn.Module):
    """Six post-norm layers, width 64, 4 heads, one masked sequence as the authors have it."""

    def __init__(self):
        super().__init__()
        self.embed = mlp(2, 64, 64, 64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = mlp(64, 128, 2)

    def forward(self, xc, yc, xt):
        n, m = xc.shape[1], xt.shape[1]
        tokens = torch.cat([torch.cat([xc, yc], -1), torch.cat([xt, torch.zeros_like(xt)], -1)], 1)
        mask = torch.zeros(n + m, n + m).fill_(float("-inf"))
        mask[:, :n] = 0.0
        mean, raw = self.head(self.body(self.embed(tokens), mask=mask)[:, n:]).chunk(2, -1)
        return mean, raw.clamp(-10, 10).exp()


class Down(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 5, stride, 2)

    def forward(self, x):
        return F.relu(self.conv(x))


class ConvCnp(nn.Module):
    def __init__(self, xl, per_unit=64, reach=2.0, width=8):
        super().__init__()
        self.multiple = 32 if xl else 1
        margin = 8 / per_unit
        low = math.floor((-reach - margin) * per_unit / self.multiple) * self.multiple
        cells = torch.arange(low, -low) / per_unit
        self.register_buffer("cells", cells)
        self.log_in = nn.Parameter(torch.tensor(math.log(2 / per_unit)))
        self.log_out = nn.Parameter(torch.tensor(math.log(2 / per_unit)))
        self.embed = nn.Linear(2, width)
        self.xl, self.per_unit = xl, per_unit
        if not xl:
            widths = [width, 2 * width, 4 * width, 2 * width, width]
            self.layers = nn.Sequential(*(Down(a, b, 1) for a, b in zip(widths, widths[1:])))
        else:
            at = [width << (i // 2) for i in range(7)]
            self.down = nn.ModuleList(Down(at[i], at[i + 1], 1 if i == 0 else 2) for i in range(6))
            beside = [1 if i == 5 else 2 for i in range(6)]
            self.up = nn.ModuleList(Down(beside[i] * at[i + 1], at[i], 1) for i in range(6))
        self.head = nn.Linear(2 * width if xl else width, 2)

    def weights(self, x, log):
        return torch.exp(-0.5 * ((x - self.cells) / log.exp()) ** 2)  # [batch, site, cell]

    def forward(self, xc, yc, xt):
        seen = torch.cat([torch.ones_like(yc), yc], -1)
        sums = self.weights(xc, self.log_in).transpose(1, 2) @ seen
        density = sums[..., :1]
        raster = torch.cat([torch.log(density + 1), sums[..., 1:] / (density + 1e-4)], -1)
        x = self.embed(raster).transpose(1, 2)
        if self.xl:
            left = [x]
            for layer in self.down:
                left.append(layer(left[-1]))
            y = left.pop()
            for i in reversed(range(6)):
                if i > 0:
                    y = F.interpolate(y, scale_factor=2, mode="nearest")
                y = torch.cat([self.up[i](y), left[i]], 1)
        else:
            y = self.layers(x)
        features = self.weights(xt, self.log_out) @ y.transpose(1, 2)
        share = torch.exp(-self.log_out) / (math.sqrt(2 * math.pi) * self.per_unit)
        return split(self.head(features * share))


def step_time(name):
    models = {"cnp": Cnp, "tnp-d": TnpD, "convcnp": lambda: ConvCnp(False)}
    model = models.get(name, lambda: ConvCnp(True))()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-4)
    sites = lambda n: 4 * torch.rand(args.batch, n, 1) - 2
    xc, xt = sites(args.contexts), sites(args.targets)
    yc, yt = torch.sin(3 * xc), torch.sin(3 * xt)
    walls, cpu = [], 0.0
    for i in range(args.steps):
        wall, before = time.perf_counter(), time.process_time()
        mean, sd = model(xc, yc, xt)
        loss = (0.5 * ((yt - mean) / sd) ** 2 + sd.log() + 0.5 * math.log(2 * math.pi)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if i >= 5:
            walls.append(1e3 * (time.perf_counter() - wall))
            cpu += 1e3 * (time.process_time() - before)
    return {
        "model": name,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": args.batch,
        "contexts": args.contexts,
        "targets": args.targets,
        "threads": args.threads,
        "best_ms": round(min(walls), 3),
        "median_ms": round(statistics.median(walls), 3),
        "cpu_ms": round(cpu / len(walls), 3),
        "steps_per_s": round(1e3 / min(walls), 1),
        "loss": round(loss.item(), 4),
    }


for name in args.models:
    print(json.dumps(step_time(name)))
