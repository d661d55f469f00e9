"""One layer of biased scan attention, forward, in JAX: the peer of `isopleth bench attention`.

An online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over chunks of keys, for one chunk of
queries after another, with an RBF distance bias; one jitted function. Prints one JSON object.
"""

import argparse
import json
import os
import resource
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--contexts", type=int, default=10_000)
parser.add_argument("--targets", type=int, default=10_000)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--key-width", type=int, default=32)
parser.add_argument("--value-width", type=int, default=32)
parser.add_argument("--terms", type=int, default=1, help="terms of the RBF bias")
parser.add_argument("--chunk", type=int, default=1024)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--tf32", action="store_true", help="on a GPU, tensor cores for f32 products; exact f32 without")
parser.add_argument("--repeat", type=int, default=3)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()

# Before JAX starts: XLA takes as many threads as the process may use processors.
os.environ["JAX_PLATFORMS"] = args.device
if args.device == "cuda" and not args.tf32:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
if args.device == "cpu" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])

import jax
import jax.numpy as jnp
import jaxlib


def chunks(x):
    """`[site, …]` as `[chunk, site, …]`, padded with zeros."""
    missing = -x.shape[0] % args.chunk
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, args.chunk, *x.shape[1:])


@jax.jit
def attend(q, s, k, v, t, a, b):
    """`q` `[target, head, d]` at `s`, `k` and `v` `[context, head, …]` at `t`."""
    seen = chunks(jnp.ones(k.shape[0], bool))
    q = q / args.key_width**0.5

    def one(query):
        q, s = query

        def step(carry, key):
            top, total, out = carry
            k, v, t, seen = key
            d2 = jnp.square(s[:, None] - t[None]).sum(-1)
            scores = jnp.einsum("qhd,khd->hqk", q, k)
            for i in range(args.terms):
                scores += a[:, i, None, None] * jnp.exp(-b[:, i, None, None] * d2)
            scores = jnp.where(seen, scores, -jnp.inf)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            keep = jnp.exp(top - higher)
            total = keep * total + weights.sum(-1)
            out = keep[..., None] * out + jnp.einsum("hqk,khw->hqw", weights, v)
            return (higher, total, out), None

        rows = (args.heads, args.chunk)
        # Finite, since −∞ less −∞ is no number.
        start = (jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros((*rows, args.value_width)))
        (_, total, out), _ = jax.lax.scan(step, start, (chunks(k), chunks(v), chunks(t), seen))
        return (out / total[..., None]).transpose(1, 0, 2)

    out = jax.lax.map(one, (chunks(q), chunks(s)))
    return out.reshape(-1, *out.shape[2:])[: q.shape[0]]


keys = iter(jax.random.split(jax.random.key(args.seed), 5))
normal = lambda *shape: jax.random.normal(next(keys), shape)
square = lambda n: jax.random.uniform(next(keys), (n, 2), minval=-1, maxval=1)
q, k = normal(args.targets, args.heads, args.key_width), normal(args.contexts, args.heads, args.key_width)
v = normal(args.contexts, args.heads, args.value_width)
s, t = square(args.targets), square(args.contexts)
each = args.heads * args.terms
reach = 1.5 * (0.05 / 1.5) ** (jnp.arange(each) / each)
a, b = jnp.ones((args.heads, args.terms)), (1 / reach**2).reshape(args.heads, args.terms)

start = time.perf_counter()
out = jax.block_until_ready(attend(q, s, k, v, t, a, b))
compile_s = time.perf_counter() - start
walls, cpus = [], []
for _ in range(args.repeat):
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(attend(q, s, k, v, t, a, b))
    walls.append(time.perf_counter() - start)
    cpus.append(time.process_time() - cpu)

# The first targets against the whole score matrix.
few = 8
d2 = jnp.square(s[:few, None] - t[None]).sum(-1)
scores = jnp.einsum("qhd,khd->hqk", q[:few], k) / args.key_width**0.5
scores += sum(a[:, i, None, None] * jnp.exp(-b[:, i, None, None] * d2) for i in range(args.terms))
truth = jnp.einsum("hqk,khw->qhw", jax.nn.softmax(scores, -1), v)
assert jnp.abs(out[:few] - truth).max() < (1e-2 if args.tf32 else 1e-4), "the scan is not attention"

pairs = args.heads * args.contexts * args.targets
print(
    json.dumps(
        {
            "command": "attention",
            "peer": "jax",
            "wall_s": min(walls),
            "cpu_s": min(cpus),
            "head_pairs": pairs,
            "ns_per_head_pair": 1e9 * min(walls) / pairs,
            "first_s": compile_s,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **vars(args),
            "precision": "tf32" if args.tf32 else "f32",
            "device": jax.devices()[0].platform,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        }
    )
)
