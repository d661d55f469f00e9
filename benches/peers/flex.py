"""Biased attention and a training step of TNP-KR in PyTorch FlexAttention: the peer of `isopleth bench` on a GPU.

`attention` is one layer, forward, and forward with backward; `train-step` is forward, backward, clip and
AdamW of the network of train_step.py. The bias is an RBF of the distance, worked out in the score
function from coordinates, as FlexAttention allows, compiled by torch.compile. On the processor, where
FlexAttention has no gradient, the same score function adds to the whole matrix: to try this file only.
Prints one JSON object.
"""

import argparse
import json
import math
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("what", choices=["attention", "train-step"])
parser.add_argument("--contexts", type=int, default=10_000)
parser.add_argument("--targets", type=int, default=10_000)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--repeat", type=int, default=5)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
parser.add_argument("--tf32", action="store_true", help="tensor cores for f32 products; exact f32 without")
args = parser.parse_args()

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

torch.manual_seed(args.seed)
torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
device = torch.device(args.device)
compiled = torch.compile if args.device == "cuda" else lambda f: f

HEADS, KEY, WIDTH, FEED = 4, 32, 64, 256
EMBED, HEAD = (256, 128), (256, 64)


def rbf(s, t, a, b):
    """Score function: adds a exp(−b d²); s `[batch, query, 2]`, t `[batch, key, 2]`, a and b `[head]`."""

    def score(score, row, head, query, key):
        x = s[row, query, 0] - t[row, key, 0]
        y = s[row, query, 1] - t[row, key, 1]
        return score + a[head] * torch.exp(-b[head] * (x * x + y * y))

    return score


def dense(q, k, v, score_mod):
    """FlexAttention in words: every pair at once."""
    counts = (*q.shape[:3], k.shape[2])
    along = [torch.arange(n).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(counts)]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return score_mod(scores, *along).softmax(-1) @ v


plain = flex_attention if args.device == "cuda" else dense
flex = compiled(plain)


def reach():
    """Widths spread over the scales that matter, one for each head: 1 / ℓ²."""
    scale = 1.5 * (0.05 / 1.5) ** (torch.arange(HEADS) / HEADS)
    return 1 / scale**2


def wait():
    if args.device == "cuda":
        torch.cuda.synchronize()


def timed(work):
    """Best and median seconds of several runs, after two that compile."""
    for _ in range(2):
        value = work()
    wait()
    walls = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        value = work()
        wait()
        walls.append(time.perf_counter() - start)
    walls.sort()
    return walls[0], walls[len(walls) // 2], value


def attention():
    normal = lambda n: torch.randn(1, HEADS, n, KEY, device=device)
    square = lambda n: 2 * torch.rand(1, n, 2, device=device) - 1
    q, k, v = normal(args.targets), normal(args.contexts), normal(args.contexts)
    s, t = square(args.targets), square(args.contexts)
    a, b = torch.ones(HEADS, device=device), reach().to(device)
    attend = lambda: flex(q, k, v, score_mod=rbf(s, t, a, b))
    with torch.no_grad():
        best, median, out = timed(attend)
    # The first targets against the whole score matrix, in f64.
    few = 8
    d2 = (s[:, :few, None] - t[:, None]).double().square().sum(-1)
    scores = q[:, :, :few].double() @ k.double().transpose(2, 3) / math.sqrt(KEY)
    scores = scores + a[None, :, None, None] * torch.exp(-b[None, :, None, None] * d2[:, None])
    truth = scores.softmax(-1) @ v.double()
    error = (out[:, :, :few].double() - truth).abs().max().item()
    assert error < (1e-2 if args.tf32 else 1e-4), f"this is not attention: {error}"
    found = {"wall_s": best, "median_s": median, "error": error}
    # FlexAttention's gradient of the bias parameters needs the scores once more: ours has them too.
    params = [x.clone().requires_grad_() for x in (q, k, v, a, b)]

    def learn():
        q, k, v, a, b = params
        flex(q, k, v, score_mod=rbf(s, t, a, b)).square().sum().backward()

    try:
        found["forward_backward_s"], _, _ = timed(learn)
    except Exception as reason:  # some versions know no gradient of what the score function captures
        found["forward_backward"] = str(reason)[:300]
    pairs = HEADS * args.contexts * args.targets
    return found | {"head_pairs": pairs, "ns_per_head_pair": 1e9 * best / pairs}


def mlp(*widths):
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.GELU(approximate="tanh")]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(WIDTH, HEADS * KEY) for _ in range(3))
        self.out, self.feed = nn.Linear(HEADS * KEY, WIDTH), mlp(WIDTH, FEED, WIDTH)
        self.a, self.b = nn.Parameter(torch.ones(HEADS)), nn.Parameter(reach().log())

    def forward(self, x, keys, s, t):
        heads = lambda x: x.unflatten(2, (HEADS, KEY)).transpose(1, 2)
        q, k, v = heads(self.query(self.before(x))), heads(self.key(keys)), heads(self.value(keys))
        read = plain(q, k, v, score_mod=rbf(s, t, self.a, self.b.exp()))
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.feed(self.between(x))


class TnpKr(nn.Module):
    def __init__(self):
        super().__init__()
        self.observed = nn.Parameter(0.5 * torch.randn(2, 4))
        self.embed, self.embed_norm = mlp(5, *EMBED, WIDTH), nn.LayerNorm(WIDTH, eps=1e-6)
        self.blocks = nn.ModuleList(Block() for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), mlp(WIDTH, *HEAD, 2)

    def tokens(self, flag, y):
        flags = self.observed[flag].expand(*y.shape[:2], 4)
        return self.embed_norm(self.embed(torch.cat([flags, y], 2)))

    def forward(self, s, y, t, surface):
        context, target = self.tokens(1, y), self.tokens(0, torch.zeros_like(surface))
        for i, block in enumerate(self.blocks):
            keys = block.before(context)
            target = block(target, keys, t, s)
            if i + 1 < len(self.blocks):  # nobody reads the context after the last block
                context = block(context, keys, s, s)
        raw = self.head(self.norm(target))
        mean, sd = raw[..., :1], nn.functional.softplus(raw[..., 1:]) + 1e-6
        return (0.5 * ((surface - mean) / sd) ** 2 + sd.log() + 0.5 * math.log(2 * math.pi)).mean()


def train_step():
    model = TnpKr().to(device)
    fused = {"fused": True} if args.device == "cuda" else {}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, **fused)
    place = lambda n: 2 * torch.rand(args.batch, n, 2, device=device) - 1
    normal = lambda n: torch.randn(args.batch, n, 1, device=device)
    batch = place(args.contexts), normal(args.contexts), place(args.targets), normal(args.targets)
    forward = compiled(model)

    def step():
        optimiser.zero_grad(set_to_none=True)
        loss = forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        return loss

    best, median, loss = timed(step)
    count = sum(p.numel() for p in model.parameters())
    return {"wall_s": best, "median_s": median, "steps_per_s": 1 / best, "loss": loss.item(), "parameters": count}


start = time.perf_counter()
found = attention() if args.what == "attention" else train_step()
card = {}
if args.device == "cuda":
    card = {"card": torch.cuda.get_device_name(), "peak_card_mib": torch.cuda.max_memory_allocated() / 2**20}
report = {"command": args.what, "peer": "torch flex_attention", **found, "all_s": time.perf_counter() - start, **card}
print(json.dumps(report | vars(args) | {"precision": "tf32" if args.tf32 else "f32", "torch": torch.__version__}))
