#!/usr/bin/env python3
"""Writes the survey behind the map benchmark: 1,000 sites over six by six degrees, seed 3."""
import math
import random

random.seed(3)
print("lon,lat,tested,positive")
for _ in range(1000):
    x, y = random.uniform(8, 14), random.uniform(2, 8)
    logit = -1.2 + 1.2 * math.sin(1.7 * x) + math.cos(2.1 * y) + random.gauss(0, 0.4)
    p = 1 / (1 + math.exp(-logit))
    n = random.randint(20, 120)
    print(f"{x:.5f},{y:.5f},{n},{sum(random.random() < p for _ in range(n))}")
