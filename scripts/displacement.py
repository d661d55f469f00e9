#!/usr/bin/env python3
"""What `--displacement` is worth: simulated surveys, moved as surveys are before they are published, and the
true prevalence at places that are known. Needs numpy. Usage: displacement.py ISOPLETH [SURVEYS] [MODELS]"""
import csv, subprocess, sys, tempfile
from pathlib import Path
import numpy as np

isopleth, surveys = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
models = sys.argv[3].split(",") if len(sys.argv) > 3 else ["gp", "prevalence"]
SIDE, SITES, PLACES, TESTED, VILLAGE = 100.0, 150, 200, 60, 0.3

def logit(p): return np.log(p / (1 - p))

def moved(rng, n, rule, urban):
    if rule == "dhs":
        reach = np.where(urban, 2.0, np.where(rng.random(n) < 0.01, 10.0, 5.0))
    else:
        reach = np.full(n, float(rule))
    far, angle = reach * rng.random(n), 2 * np.pi * rng.random(n)
    return np.stack([far * np.cos(angle), far * np.sin(angle)], 1)

for rule, scale in [("dhs", 10.0), ("5", 10.0), ("10", 20.0)]:
    found = {}
    for seed in range(surveys):
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0, SIDE, (SITES + PLACES, 2))
        d = np.sqrt(3) * np.linalg.norm(xy[:, None] - xy[None], axis=2) / scale
        cov = (1 + d) * np.exp(-d) + 1e-8 * np.eye(len(xy))
        surface = -1 + np.linalg.cholesky(cov) @ rng.standard_normal(len(xy))
        village = surface[:SITES] + VILLAGE * rng.standard_normal(SITES)
        positive = rng.binomial(TESTED, 1 / (1 + np.exp(-village)))
        urban = rng.random(SITES) < 0.4
        at = xy[:SITES] + moved(rng, SITES, rule, urban)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            with open(folder / "survey.csv", "w", newline="") as out:
                write = csv.writer(out)
                write.writerow(["x", "y", "positive", "tested", "URBAN_RURA"])
                for (x, y), k, u in zip(at, positive, urban):
                    write.writerow([f"{x:.5f}", f"{y:.5f}", k, TESTED, "U" if u else "R"])
            np.savetxt(folder / "places.csv", xy[SITES:], fmt="%.5f", delimiter=",", header="x,y", comments="")
            for model in models:
                for how in [[], ["--displacement", rule]]:
                    subprocess.run([isopleth, "predict", "--context", folder / "survey.csv", "--targets",
                        folder / "places.csv", "--crs", "local:km", "--model", model, "--out",
                        folder / "out.csv", "--force", *how], check=True, stdout=subprocess.DEVNULL)
                    with open(folder / "out.csv") as table:
                        rows = list(csv.DictReader(table))
                    low, mid, high = (logit(np.array([float(r[f"surface_quantile_{q}"]) for r in rows]))
                                      for q in ("0.025", "0.5", "0.975"))
                    truth, sd = surface[SITES:], (high - low) / 3.92
                    score = np.mean(-0.5 * ((truth - mid) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi))
                    held = np.mean((low < truth) & (truth < high))
                    found.setdefault((model, bool(how)), []).append((score, held))
    for (model, how), each in found.items():
        each = np.array(each)
        gain = each[:, 0] - np.array(found[(model, False)])[:, 0]
        print(f"displaced by {rule}, length scale {scale:g} km, {model}, {'integrated' if how else 'ignored'}: "
              f"log score {each[:, 0].mean():.3f} (gain {gain.mean():+.3f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.3f}), "
              f"95 % intervals hold {each[:, 1].mean():.3f}", flush=True)
