"""What a GPU machine is asked: contract tests, accuracy, benches, peers, training. See gpu-check.sh.

The report is rewritten after every step, so that it is whole JSON whenever this is stopped. Needs
nothing but Python's standard library; peers need PyTorch or JAX, and are left out without.
"""

import argparse
import datetime
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isopleth", required=True, help="the command")
    parser.add_argument("--contract", required=True, nargs="+", help="the contract tests")
    parser.add_argument("--device", default="cuda", help="cpu: every step in tiny sizes")
    parser.add_argument("--out", default="out", type=pathlib.Path)
    parser.add_argument("--seconds", default=560, type=float, help="for all of it")
    return parser.parse_args()


def ask_card(field):
    """What nvidia-smi says of the first card; None without it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = said.stdout.strip().splitlines()
    return lines[0].strip() if said.returncode == 0 and lines else None


class Memory:
    """The most memory that the first card showed since it was last asked, MiB."""

    def __init__(self):
        self.most = None
        try:
            command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0", "-lms", "100"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
            return
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.most = max(self.most or 0, int(line))

    def since(self):
        most, self.most = self.most, None
        return most

    def stop(self):
        if self.process:
            self.process.terminate()


class Check:
    def __init__(self, given):
        self.given, self.start = given, time.monotonic()
        self.real = given.device != "cpu"
        self.out = given.out / "gpu-check.json"
        self.work = given.out / "gpu-check.tmp"
        self.memory = Memory()
        self.report = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "device": given.device,
            "sizes": "real" if self.real else "tiny: only whether every step answers",
            "card": ask_card("name"),
            "driver": ask_card("driver_version"),
            "card_memory_mib": ask_card("memory.total"),
            "card_memory_before_mib": ask_card("memory.used"),
            "finished": False,
            "peers": {},
            "steps": [],
        }

    def left(self):
        return self.given.seconds - (time.monotonic() - self.start)

    def write(self):
        temporary = self.out.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.report, indent=2) + "\n")
        temporary.replace(self.out)

    def step(self, name, command, limit, needed=True, read=None, environment=None):
        """Runs a command; notes how it ended, and what `read` makes of its output (JSON if not said)."""
        step = {"name": name, "command": [str(word) for word in command], "needed": needed}
        self.report["steps"].append(step)
        limit = min(limit, self.left() - 5)
        if limit < 3:
            step["skipped"] = "no time left"
            self.write()
            return None
        print(f"== {name}", flush=True)
        self.memory.since()
        start = time.monotonic()
        log = self.work / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".log")
        code = None
        try:
            with open(log, "w") as errors:
                ran = subprocess.run(
                    step["command"], stdout=subprocess.PIPE, stderr=errors, text=True, timeout=limit,
                    cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
                )
            code, said = ran.returncode, ran.stdout
        except subprocess.TimeoutExpired as ended:
            said = ended.stdout or b""
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            step["stopped"] = f"after {limit:.0f} s"
        except OSError as error:
            said = ""
            step["stopped"] = str(error)
        step["exit"], step["seconds"] = code, round(time.monotonic() - start, 2)
        memory = self.memory.since()
        if memory is not None:
            step["card_memory_mib"] = memory
        heard = log.read_text(errors="replace") if log.exists() else ""
        try:
            step["report"] = (read or json.loads)(said)
        except (ValueError, KeyError, AttributeError, OSError) as error:
            if code == 0:
                step["stopped"] = f"its answer cannot be read: {error}"
        if code != 0 or "stopped" in step:
            step["said"] = (said[-1500:] + "\n" + heard[-1500:]).strip()
            print(step["said"], flush=True)
        print(f"   {step['seconds']} s, exit {code}", flush=True)
        self.write()
        return step.get("report") if code == 0 and "stopped" not in step else None


def counts(said):
    """Of the output of a Rust test program."""
    found = re.search(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", said)
    failed = re.findall(r"^test (.*) \.\.\. FAILED$", said, re.M)
    passed, wrong, ignored = map(int, found.groups())
    if passed + wrong == 0:
        raise ValueError("no test ran")
    return {"passed": passed, "failed": wrong, "ignored": ignored, "names_of_failed": failed}


def tables(folder, sites, targets):
    """A survey and a table of places, local km; Parquet where pyarrow is, else CSV."""
    rng = random.Random(1)
    east, north, value = [], [], []
    for _ in range(sites):
        x, y = rng.uniform(0, 1000), rng.uniform(0, 1000)
        east.append(x), north.append(y)
        value.append(2 * (x / 1000 - 0.5) ** 2 + 0.3 * rng.gauss(0, 1))
    side = max(2, round(targets ** 0.5))
    at = [(1000 * (i % side) / side, 1000 * (i // side) / side) for i in range(targets)]
    survey = {"east": east, "north": north, "value": value}
    places = {"east": [p[0] for p in at], "north": [p[1] for p in at]}
    written = []
    for name, table in (("survey", survey), ("places", places)):
        try:
            import pyarrow
            import pyarrow.parquet

            path = folder / f"{name}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(table), path)
        except ImportError:
            path = folder / f"{name}.csv"
            with open(path, "w") as file:
                file.write(",".join(table) + "\n")
                file.writelines(",".join(f"{v:.6f}" for v in row) + "\n" for row in zip(*table.values()))
        written.append(path)
    return written


def run(check):
    given, real = check.given, check.real
    isopleth, device = given.isopleth, ["--device", given.device]
    size = lambda large, small: large if real else small
    thin = size([], ["--layers", "2", "--heads", "2", "--key-width", "8", "--value-width", "8"])
    flat = size([], ["--heads", "2", "--key-width", "8", "--value-width", "8"])
    must = {"ISOPLETH_GPU": "1"} if real else {}  # tests fail where they would be skipped

    check.step("version", [isopleth, "--version"], 20, read=str.strip)
    # Every law for a card has `on_a_gpu` in its path; on the processor, the laws of the same arithmetic.
    laws = "on_a_gpu" if real else "cuda"
    for program in given.contract:
        name = f"contract tests, {pathlib.Path(program).name}"
        check.step(name, [program, laws, "--test-threads", "1"], 150, read=counts, environment=must)
    for precision in PRECISIONS[given.device == "cpu"]:
        check.step(f"accuracy {precision}", [isopleth, "bench", "accuracy", *device, "--precision", precision, "--json"], 60)

    found = {}

    def bench(name, what, arguments, limit=120, needed=True):
        command = [isopleth, "bench", what, *arguments, *device, "--json"]
        found[name] = check.step(name, command, limit, needed)

    contexts = size("100K", "300")
    bench("attention 10K × 10K", "attention", ["--contexts", size("10K", "200"), "--targets", size("10K", "200"), *flat])
    bench("attention 100K × 100K", "attention", ["--contexts", contexts, "--targets", size("100K", "400"), *flat])
    bench("attention 100K × 100K, Matérn 3/2", "attention",
          ["--contexts", contexts, "--targets", size("100K", "400"), "--bias", "matern-3/2", *flat])
    bench("condition 100K", "condition", ["--contexts", contexts, *thin])
    million = size("1048576", "500")
    bench("scan 100K × 1,048,576", "map", ["--contexts", contexts, "--targets", million, *thin])
    for precision in PRECISIONS[not real][1:]:
        rounded = ["--precision", precision]
        bench(f"attention 100K × 100K, {precision}", "attention",
              ["--contexts", contexts, "--targets", size("100K", "400"), *rounded, *flat])
        bench(f"scan 100K × 1,048,576, {precision}", "map", ["--contexts", contexts, "--targets", million, *rounded, *thin])
    bench("DKA 100K × 1,048,576", "map", ["--contexts", contexts, "--targets", million, "--attention", "dka",
                                          *size([], ["--layers", "2"])])
    bench("block-sparse 100K × 1,048,576", "map",
          ["--contexts", contexts, "--targets", million, "--attention", "sparse", "--lose", "1e-3",
           "--layout", "clustered", "--bias", "scalar", "--reach", "0.01", *thin])
    step = ["--batch", size("32", "2"), "--contexts", size("256", "12"), "--targets", size("256", "12"), "--fused"]
    bench("training step", "train-step", [*step, "--repeat", size("50", "2"), *thin])

    # A table in, a table out: GeoTIFFs need GDAL, which is not there.
    try:
        survey, places = tables(check.work, size(100_000, 40), size(1_048_576, 90))
    except OSError as error:
        check.report["steps"].append({"name": "tables", "needed": True, "stopped": str(error)})
    else:
        out = check.work / "answers.parquet"
        found["predict"] = check.step(
            "table to table, 100K × 1,048,576",
            [isopleth, "predict", "--context", survey, "--targets", places, "--out", out, "--force", "--lon", "east",
             "--lat", "north", "--value", "value", "--crs", "local:km", "--quantiles", "0.025,0.975",
             # By number, or the processor would take a missing card's place.
             "--device", "cuda:0" if given.device == "cuda" else given.device],
            200, read=lambda _: json.loads((check.work / "answers.parquet.run.json").read_text()),
        )

    # A training as it is: prior, step, validation, state; and its speed by the journal.
    recipe = ROOT / "models/continuous.toml" if real else tiny(check.work)
    model = check.work / "trained.safetensors"
    found["train"] = check.step(
        "training", [isopleth, "train", recipe, "--out", model, "--force", *device, "--stop-at", size("2000", "4")], 120,
        read=lambda _: journal(model.with_name("trained.journal.jsonl")),
    )

    if os.environ.get("PEERS") != "no":
        peers(check, found)
    check.report["targets"] = targets(check, found) if real else []


# By device: a card, the processor.
PRECISIONS = {False: ["f32", "tf32", "bf16"], True: ["f32", "bf16"]}


def tiny(folder):
    recipe = folder / "tiny.toml"
    recipe.write_text("""name = "tiny"
predicts = "a value"
[model]
kind = "cnp"
width = 8
depth = 1
[prior]
kind = "gp"
length_scale = { log-uniform = [0.1, 1.0] }
sill_sd = 1.0
nugget_sd = 0.3
[design]
context = [{ sites = [3, 12], weight = 1.0 }]
targets = 8
[task]
likelihood = "gaussian"
[train]
steps = 4
warmup = 1
rows = 4
validate_every = 2
validate_tasks = 4
checkpoint_every = 2
""")
    return recipe


def journal(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        raise ValueError("an empty journal")
    return {"steps_per_s": max(line["steps_per_s"] for line in lines), "last": lines[-1]}


def peers(check, found):
    """The same work in PyTorch and JAX, on the same device in the same run."""
    import importlib.util

    has = lambda name: importlib.util.find_spec(name) is not None
    size = lambda large, small: str(size_of(large, small))
    size_of = lambda large, small: large if check.real else small
    many, few = size(100_000, 200), size(256, 12)
    attention = ["--contexts", many, "--targets", many, "--repeat", size(3, 1)]
    step = ["--contexts", few, "--targets", few, "--batch", size(32, 2), "--layers", size(6, 2), "--repeat", size(50, 1)]
    device = ["--device", check.given.device.partition(":")[0]]
    programs = {
        "torch": [["flex.py", "attention", *attention], ["flex.py", "train-step", *step],
                  ["flex.py", "attention", "--tf32", *attention]],
        "jax": [["attention.py", "--chunk", size(8192, 64), *attention], ["train_step.py", *step]],
    }
    for library, commands in programs.items():
        if not has(library):
            check.report["peers"][library] = "not installed"
            continue
        words = [[sys.executable, ROOT / "benches/peers" / program, *more, *device] for program, *more in commands]
        mine = [found.get("attention 100K × 100K"), found.get("training step"), found.get("attention 100K × 100K, tf32")]
        ours = zip(("attention", "train-step", "attention tf32"), words, mine)
        for name, words, mine in ours:
            theirs = check.step(f"peer {library}, {name}", words, 120, needed=False, environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
            if theirs and mine:
                ratio = theirs["wall_s"] / mine["wall_s"]
                check.report["peers"][f"{library} over ours, {name}"] = round(ratio, 3)
    check.write()


def targets(check, found):
    """What issue 4 asks for, beside what was found; None where a step gave no answer."""
    get = lambda name, field: (found.get(name) or {}).get(field)
    steps = get("training step", "wall_s")
    table = [
        ("scan 100K × 1,048,576, s", get("scan 100K × 1,048,576", "wall_s"), 4, "at most"),
        ("the same, memory of tensors, MiB", get("scan 100K × 1,048,576", "peak_card_mib"), 4096, "at most"),
        ("table to table, s (the target is for GeoTIFFs)", get("predict", "seconds"), 8, "at most"),
        ("block-sparse, s", get("block-sparse 100K × 1,048,576", "wall_s"), 2, "at most"),
        ("scan 100K × 1,048,576 in tf32, s", get("scan 100K × 1,048,576, tf32", "wall_s"), 4, "at most"),
        ("scan 100K × 1,048,576 in bf16, s", get("scan 100K × 1,048,576, bf16", "wall_s"), 4, "at most"),
        ("DKA, s", get("DKA 100K × 1,048,576", "wall_s"), 1, "at most"),
        ("training steps a second, batch 32, 256 + 256", 1 / steps if steps else None, 150, "at least"),
    ]
    ratios = {name: r for name, r in check.report["peers"].items() if isinstance(r, float)}
    for work, least in (("attention", 5), ("train-step", 3)):
        theirs = [ratio for name, ratio in ratios.items() if name.endswith(work)]
        table.append((f"fastest peer over ours, {work}", min(theirs) if theirs else None, least, "at least"))
    met = lambda value, limit, way: None if value is None else (value <= limit if way == "at most" else value >= limit)
    return [{"what": w, "found": v, way.replace(" ", "_"): limit, "met": met(v, limit, way)} for w, v, limit, way in table]


def main():
    check = Check(options())
    check.work.mkdir(parents=True, exist_ok=True)
    try:
        check.write()
        run(check)
        check.report["finished"] = True
    finally:
        check.memory.stop()
        steps = check.report["steps"]
        bad = [s["name"] for s in steps if s.get("needed") and (s.get("exit") != 0 or "stopped" in s or "skipped" in s)]
        wrong = [s["name"] for s in steps if s["name"].startswith("accuracy") and not (s.get("report") or {}).get("passed")]
        check.report["failed"] = bad + [name for name in wrong if name not in bad]
        check.report["seconds"] = round(time.monotonic() - check.start, 1)
        check.write()
        shutil.rmtree(check.work, ignore_errors=True)
    for target in check.report.get("targets", []):
        print(json.dumps(target, ensure_ascii=False))
    print(f"== {check.out}: {len(check.report['steps'])} steps, failed: {', '.join(check.report['failed']) or 'none'}")
    return 1 if check.report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
