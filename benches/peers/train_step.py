"""One training step of TNP-KR with biased attention, in JAX: the peer of `isopleth bench train-step`.

Written from the formulas of arXiv:2411.12502 and arXiv:2506.09163: the sizes of the second (475,770
parameters with --terms 5), dense attention, an RBF network as distance bias, AdamW after a clip by
global norm. The whole step is one jitted function. Prints one JSON object.
"""

import argparse
import json
import os
import resource
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--contexts", type=int, default=256)
parser.add_argument("--targets", type=int, default=256)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--terms", type=int, default=1, help="terms of the RBF bias")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--tf32", action="store_true", help="on a GPU, tensor cores for f32 products; exact f32 without")
parser.add_argument("--repeat", type=int, default=5)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()

# Before JAX starts: XLA takes as many threads as the process may use processors.
os.environ["JAX_PLATFORMS"] = args.device
if args.device == "cuda" and not args.tf32:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
if args.device == "cpu" and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)

import jax
import jax.numpy as jnp
import jaxlib
import optax

HEADS, KEY, VALUE, WIDTH, FEED = 4, 32, 32, 64, 256
EMBED, HEAD = (256, 128), (256, 64)


def dense(key, inputs, outputs):
    weight = jax.nn.initializers.orthogonal()(key, (inputs, outputs), jnp.float32)
    return {"weight": weight, "bias": jnp.zeros(outputs)}


def norm(width):
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def mlp(key, widths):
    keys = jax.random.split(key, len(widths) - 1)
    return [dense(k, a, b) for k, a, b in zip(keys, widths, widths[1:])]


def init(key):
    keys = iter(jax.random.split(key, 3 + 6 * args.layers))
    # Widths spread over the scales that matter: equal terms would stay equal for ever.
    scale = 1.5 * (0.05 / 1.5) ** (jnp.arange(HEADS * args.terms) / (HEADS * args.terms))
    block = lambda: {
        "before": norm(WIDTH),
        "query": dense(next(keys), WIDTH, HEADS * KEY),
        "key": dense(next(keys), WIDTH, HEADS * KEY),
        "value": dense(next(keys), WIDTH, HEADS * VALUE),
        "out": dense(next(keys), HEADS * VALUE, WIDTH),
        "a": jnp.ones((HEADS, args.terms)),
        "b": jnp.log(1 / scale**2).reshape(HEADS, args.terms),
        "between": norm(WIDTH),
        "feed": mlp(next(keys), (WIDTH, FEED, WIDTH)),
    }
    return {
        "observed": 0.5 * jax.random.normal(next(keys), (2, 4)),
        "embed": mlp(next(keys), (4 + 1, *EMBED, WIDTH)),
        "embed_norm": norm(WIDTH),
        "blocks": [block() for _ in range(args.layers)],
        "norm": norm(WIDTH),
        "head": mlp(next(keys), (WIDTH, *HEAD, 2)),
    }


def apply_dense(p, x):
    return x @ p["weight"] + p["bias"]


def apply_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]


def apply_mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.gelu(apply_dense(layer, x), approximate=True)
    return apply_dense(layers[-1], x)


def squared_distances(a, b):
    return jnp.square(a[:, :, None] - b[:, None]).sum(-1)  # [batch, query, key]


def attend(p, queries, keys, d2, mask):
    """softmax(q·k / √d + Σ a exp(−b d²)) v over observed keys, then the output layer."""
    heads = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
    q, k, v = (heads(apply_dense(p[n], x)) for n, x in zip(("query", "key", "value"), (queries, keys, keys)))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / KEY**0.5
    widths = jnp.exp(p["b"])
    for term in range(args.terms):
        a, b = (x[None, :, term, None, None] for x in (p["a"], widths))
        scores += a * jnp.exp(-b * d2[:, None])
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    read = jnp.einsum("bhqk,bkhw->bqhw", weights, v)
    return apply_dense(p["out"], read.reshape(*read.shape[:2], -1))


def forward(params, batch):
    tokens = lambda flag, f: apply_norm(
        params["embed_norm"],
        apply_mlp(
            params["embed"],
            jnp.concatenate([jnp.broadcast_to(params["observed"][flag], (*f.shape[:2], 4)), f], -1),
        ),
    )
    context, target = tokens(1, batch["y"]), tokens(0, jnp.zeros_like(batch["surface"]))
    among = squared_distances(batch["s"], batch["s"])
    across = squared_distances(batch["t"], batch["s"])
    for i, block in enumerate(params["blocks"]):

        def read(x, normed, d2):
            x = x + attend(block, normed, keys, d2, batch["mask"])
            return x + apply_mlp(block["feed"], apply_norm(block["between"], x))

        keys = apply_norm(block["before"], context)
        target = read(target, apply_norm(block["before"], target), across)
        if i + 1 < len(params["blocks"]):  # nobody reads the context after the last block
            context = read(context, keys, among)
    raw = apply_mlp(params["head"], apply_norm(params["norm"], target))
    return raw[..., :1], jax.nn.softplus(raw[..., 1:]) + 1e-6


def loss(params, batch):
    mean, sd = forward(params, batch)
    z = (batch["surface"] - mean) / sd
    return (0.5 * z**2 + jnp.log(sd) + 0.5 * jnp.log(2 * jnp.pi)).mean()


optimiser = optax.chain(
    optax.clip_by_global_norm(0.5), optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4)
)


@jax.jit
def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


keys = jax.random.split(jax.random.key(args.seed), 6)
shape = lambda n, width: (args.batch, n, width)
batch = {
    "s": jax.random.uniform(keys[0], shape(args.contexts, 2), minval=-1, maxval=1),
    "t": jax.random.uniform(keys[1], shape(args.targets, 2), minval=-1, maxval=1),
    "y": jax.random.normal(keys[2], shape(args.contexts, 1)),
    "surface": jax.random.normal(keys[3], shape(args.targets, 1)),
    "mask": jnp.ones((args.batch, args.contexts), bool),
}
params = init(keys[4])
state = optimiser.init(params)
count = sum(x.size for x in jax.tree.leaves(params))

start = time.perf_counter()
for _ in range(2):
    params, state, value = jax.block_until_ready(step(params, state, batch))
compile_s = time.perf_counter() - start
walls, cpu = [], time.process_time()
for _ in range(args.repeat):
    start = time.perf_counter()
    params, state, value = jax.block_until_ready(step(params, state, batch))
    walls.append(1e3 * (time.perf_counter() - start))
cpu = 1e3 * (time.process_time() - cpu) / args.repeat
walls.sort()
print(
    json.dumps(
        {
            "command": "train-step",
            "peer": "jax",
            "wall_s": walls[0] / 1e3,
            "best_ms": walls[0],
            "median_ms": walls[len(walls) // 2],
            "cpu_ms": cpu,
            "steps_per_s": 1e3 / walls[0],
            "loss": float(value),
            "compile_s": compile_s,
            "parameters": count,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **{k: vars(args)[k] for k in ("batch", "contexts", "targets", "layers", "terms", "threads", "repeat", "seed")},
            "precision": "tf32" if args.tf32 else "f32",
            "device": jax.devices()[0].platform,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "optax": optax.__version__,
        }
    )
)
