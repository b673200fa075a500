"""Could the balancer choose with a quarter of its samples?  python results/race.py runs/toy-bstar-*-[123]: the table of RESULTS "Racing the temperatures"."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import metrics


def best(s):
    """The best (temperature, tau) of a surface, ties as the plain search breaks them here: the lowest temperature, the highest tau"""
    return min(np.argwhere(s >= s.max() - 1e-12).tolist(), key=lambda at: (at[0], -at[1]))


def quarter(effect, order):
    return best(effect[:, order[:len(order) // 4]].mean(1))


def halving(effect, order):
    """All temperatures on a few questions, the better half on more, ...; the winner's tau from what the budget leaves"""
    T, Q, _ = effect.shape
    budget, rounds, alive, used, n = T * Q / 4, int(np.ceil(np.log2(T))), [*range(T)], 0, 0
    for _ in range(rounds):
        m = min(Q, n + max(1, int(budget / rounds / len(alive))))
        used, n = used + (m - n) * len(alive), m
        score = effect[np.ix_(alive, order[:n])].mean(1).max(1)
        alive = [alive[k] for k in np.argsort(-score, kind="stable")[:-(-len(alive) // 2)]]
    return alive[0], best(effect[alive[:1]][:, order[:min(Q, n + int(budget - used))]].mean(1))[1]


def race(effect, order, z):
    """A temperature leaves when its paired difference to the leader, less z standard errors, is above 0; until the budget is out"""
    T, Q, _ = effect.shape
    alive, left, n, step = [*range(T)], T * Q / 4, 0, max(5, Q // 24)
    while add := min(step, Q - n, int(left / len(alive))):
        left, n = left - add * len(alive), n + add
        seen = effect[np.ix_(alive, order[:n])]
        s = seen.mean(1)
        lead, tau = best(s)
        d = [seen[lead, :, tau] - seen[b, :, s[b].argmax()] for b in range(len(alive))]
        alive = [t for b, t in enumerate(alive) if b == lead or d[b].mean() <= z * d[b].std(ddof=1) / np.sqrt(n)]
    i, tau = best(effect[np.ix_(alive, order[:n])].mean(1))
    return alive[i], tau


def main(runs):
    rng, effects = np.random.default_rng(0), []
    for run in map(Path, runs):
        c = metrics.read_run(run).config
        for file in sorted((run / "samples").glob("balance_*.npz")):
            d = np.load(file)
            n_star = -(-c["steps_per_iter"] * c["batch_size"] // c["queries_per_iter"])
            effects.append(np.stack([metrics.effects(*x, metrics.grid("taus", c["taus"]), n_star)[0] for x in zip(d["reward"], d["correct"], d["text"])]))
    if not effects:
        raise data.UserError(f"{' '.join(runs)}: no samples/balance_*.npz; a run of --method bstar leaves them")
    resampled = {Q: [e[:, rng.integers(e.shape[1], size=Q)] for e in effects] for Q in (600, 2400)}
    print(f"{len(effects)} decisions\n\n| chosen with | within 0.005 | mean gap | 600 questions | 2,400 questions |\n|---|---|---|---|---|")
    for name, choose in (("a quarter of the questions", quarter), ("successive halving", halving), *((f"race, z = {z}", lambda e, o, z=z: race(e, o, z)) for z in (1, 2))):
        gaps = []
        for sets, n in ((effects, 20), (resampled[600], 2), (resampled[2400], 2)):
            gaps.append(np.array([e.mean(1).max() - e.mean(1)[tuple(choose(e, rng.permutation(e.shape[1])))] for e in sets for _ in range(n)]))
        print(f"| {name} | {np.mean(gaps[0] <= 0.005):.0%} | {gaps[0].mean():.3f} | {np.mean(gaps[1] <= 0.005):.0%} | {np.mean(gaps[2] <= 0.005):.0%} |")
    errors, leads, halves = [], [], []
    for e in effects:
        s = e.mean(1)
        i, j = best(s)
        errors += [(e[i, :, j] - e[t, :, s[t].argmax()]).std(ddof=1) / np.sqrt(e.shape[1]) for t in range(len(s)) if t != i]
        leads.append(-np.diff(np.sort(s.max(1))[::-1][:2])[0])
        for _ in range(20):
            order = rng.permutation(e.shape[1])
            a, b = (e[:, o].mean(1) for o in np.array_split(order, 2))
            halves.append(b.max() - b[tuple(best(a))])
    print(f"\na paired difference of two temperatures has a standard error of {np.median(errors):.3f} (median), the best leads the second by {np.median(leads):.3f} (median);\n"
          f"the full grid on half of the questions, judged on the other half, is within 0.005 of the best in {np.mean(np.array(halves) <= 0.005):.0%}")


if __name__ == "__main__":
    data.run(lambda: main(sys.argv[1:] or sys.exit(__doc__)))
