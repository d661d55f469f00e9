#!/usr/bin/env python3
"""What the years before are worth: simulated surveys of five rounds of 60 villages, foretold at 40 more villages of
the last round that were held out.

    scripts/space_time.py SURVEYS [ISOPLETH [MODEL …]]

Surveys are drawn by `isopleth sample` from a prior in which any share stays and the rest changes with a length scale of a
tenth to three times the span of the rounds. The Gaussian process is fitted to all rounds with their times, to all as if
they were one, and to the last round alone; models that read time are given all rounds with their times. Surveys are the
units of chance.
"""

import collections
import csv
import json
import math
import os
import subprocess
import sys
import tempfile

RECIPE = """
name = "five rounds"
predicts = ""
[prior]
kind = "gp"
length_scale = { log-uniform = [0.15, 1.0] }
sill_sd = { uniform = [0.7, 1.3] }
nugget_sd = { uniform = [0.2, 0.6] }
nugget_absent = 0.0
mean = { normal = [-1.3, 0.7] }
sum = 0.0
product = 0.0
anisotropic = 0.0
time_scale = { log-uniform = [0.2, 6.0] }
static_share = { uniform = [0.0, 1.0] }
kernels = { "matern-1/2" = 1, "matern-3/2" = 1 }
[design]
context = [{ sites = [1200, 1200], weight = 1 }]
targets = 1
clustered = 0.0
gridded = 0.0
aspect = 1.0
held_block = 0.0
times = { rounds = 5, continuous = 0.0, uneven = 0.0, revisited = 0.0, ahead = 0.0 }
[trials]
base = 50.0
spread = 1e-9
equal = 1.0
[task]
likelihood = "binomial"
"""
ROUNDS, VILLAGES, HELD = 5, 60, 40


def surveys(path):
    """Rows of each draw, round by round: villages to learn from, and behind them those held out."""
    draws = collections.defaultdict(lambda: collections.defaultdict(list))
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["role"] == "context":
                draws[row["task"]][round(float(row["t"]), 3)].append(row)
    for draw in draws.values():
        rounds = [draw[t] for t in sorted(draw)]
        wanted = [VILLAGES] * (ROUNDS - 1) + [VILLAGES + HELD]
        if len(rounds) == ROUNDS and all(len(r) >= n for r, n in zip(rounds, wanted)):
            yield [
                [100 * float(r["x"]), 100 * float(r["y"]), r["tested"], r["positive"], 2014 + i,
                 "held" if j >= VILLAGES else "seen"]
                for i, (of, n) in enumerate(zip(rounds, wanted)) for j, r in enumerate(of[:n])
            ]


def main():
    count, isopleth = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "isopleth"
    with tempfile.TemporaryDirectory() as folder:
        place = lambda name: os.path.join(folder, name)
        with open(place("five.toml"), "w") as file:
            file.write(RECIPE)
        draw = ["sample", place("five.toml"), "--out", place("five.csv"), "--count", str(2 * count), "--seed", "1"]
        subprocess.run([isopleth] + draw, check=True, stdout=subprocess.DEVNULL)

        def met(rows, more, model="gp"):
            with open(place("survey.csv"), "w") as file:
                file.write("x,y,tested,positive,year,fold\n")
                csv.writer(file).writerows(rows)
            how = ["--surveys", place("survey.csv"), "--crs", "local:km", "--folds", place("survey.csv") + ":fold"]
            asked = [isopleth, "validate", "--model", model, "--json"] + how + more
            said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
            return next(f for f in json.loads(said)["folds"] if f["fold"] == "held")

        found = []
        for _, rows in zip(range(count), surveys(place("five.csv"))):
            last = [r for r in rows if r[4] == 2014 + ROUNDS - 1]
            found.append({
                "with time": met(rows, ["--time", "year"]),
                "all rounds as one": met(rows, []),
                "last round alone": met(last, []),
                **{model: met(rows, ["--time", "year"], model) for model in sys.argv[3:]},
            })
    n = len(found)
    print(f"{n} surveys, {HELD} villages of the last round held out in each")
    for name in found[0]:
        gaps = [f[name]["log_score"] - f["with time"]["log_score"] for f in found]
        gap = sum(gaps) / n
        error = math.sqrt(sum((g - gap) ** 2 for g in gaps) / max(n - 1, 1) / n)
        score = sum(f[name]["log_score"] for f in found) / n
        inside = [sum(f[name]["coverage"][c] for f in found) / n for c in ("50", "80", "95")]
        print(f"{name:18} {score:8.3f}  {gap:+.3f} ± {error:.3f}  " + "  ".join(f"{c:.3f}" for c in inside))


if __name__ == "__main__":
    main()
