"""The distillation objective written out position by position, in float64: slow and obvious."""

import math


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def objective_by_hand(
    student, teacher, tokens, mask, tau, alpha, uncertainty, calibration, smoothing
):
    """Mean loss over real predictions, from nested lists; no tensor operation is used."""
    student, teacher, tokens, mask = (x.tolist() for x in (student, teacher, tokens, mask))
    hard, soft, count = 0.0, 0.0, 0
    for z_s, z_t, token, real in zip(student, teacher, tokens, mask, strict=True):
        places = [t for t in range(len(token) - 1) if real[t] and real[t + 1]]
        entropies = [-sum(p * math.log(p) for p in softmax(z_t[t])) for t in places]
        weights = [1.0] * len(places)
        if uncertainty:
            low, high = min(entropies), max(entropies)
            weights = [
                0.5 + (0.5 * (h - low) / (high - low) if high > low else 0) for h in entropies
            ]
        for t, w in zip(places, weights, strict=True):
            p, q = softmax([z / tau for z in z_t[t]]), softmax([z / tau for z in z_s[t]])
            if calibration:
                eps = smoothing * (1 - max(p))
                p = [(1 - eps) * v + eps / len(p) for v in p]
            soft += w * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            hard -= math.log(softmax(z_s[t])[token[t + 1]])
            count += 1
    return (alpha * hard + (1 - alpha) * tau**2 * soft) / count
