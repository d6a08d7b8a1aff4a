"""Asks both contenders for the same results and says how far apart they are.

fp32 results must agree to rounding. In bf16 the two compute the low-rank path in different precisions, so each is
held against an fp32 computation on the same (bf16-rounded) weights, made by upstream: ours must not be further from
that reference than upstream is, with a margin. Dropout masks differ, so with dropout the size of the noise is compared.
"""

from __future__ import annotations

from contender import Contender

FP32_LOSS = 1e-6
FP32_GRADIENT = 1e-4
BF16_MARGIN = 1.25
DROPOUT_MARGIN = 0.2


def check(upstream: Contender, ours: Contender) -> list[dict]:
    return [
        fp32_gradients(upstream, ours, "LoRA", dora=False),
        fp32_gradients(upstream, ours, "DoRA", dora=True),
        bf16_gradients(upstream, ours, "LoRA", dora=False),
        bf16_gradients(upstream, ours, "DoRA", dora=True),
        dropout_noise(upstream, ours),
        mixed_batch(upstream, ours),
    ]


def gradients(contender: Contender, dtype: str, **arguments) -> tuple[str, dict]:
    name = "-".join([contender.name, dtype, *(f"{key}={value}" for key, value in arguments.items())])
    return name, contender.ask("compute", result="gradients", arguments={"save_as": name, "dtype": dtype, **arguments})


def difference(contender: Contender, left: str, right: str) -> dict:
    return contender.ask("compute", result="difference", arguments={"left": left, "right": right})


def fp32_gradients(upstream: Contender, ours: Contender, title: str, dora: bool) -> dict:
    theirs, their_step = gradients(upstream, "fp32", dora=dora)
    mine, my_step = gradients(ours, "fp32", dora=dora)
    apart = difference(upstream, mine, theirs)
    loss = abs(my_step["loss"] / their_step["loss"] - 1)
    return row(
        f"{title} step fp32",
        their_step,
        my_step,
        f"loss {loss:.1e}, gradients {apart['overall']:.1e} (worst tensor {apart['worst']:.1e})",
        f"loss ≤ {FP32_LOSS:g}, gradients ≤ {FP32_GRADIENT:g}",
        loss <= FP32_LOSS and apart["overall"] <= FP32_GRADIENT,
    )


def bf16_gradients(upstream: Contender, ours: Contender, title: str, dora: bool) -> dict:
    reference, _ = gradients(upstream, "reference", dora=dora)
    theirs, their_step = gradients(upstream, "bf16", dora=dora)
    mine, my_step = gradients(ours, "bf16", dora=dora)
    their_error = difference(upstream, theirs, reference)["overall"]
    my_error = difference(upstream, mine, reference)["overall"]
    apart = difference(upstream, mine, theirs)["overall"]
    loss = abs(my_step["loss"] / their_step["loss"] - 1)
    return row(
        f"{title} step bf16",
        their_step,
        my_step,
        f"loss {loss:.1e}, gradients {apart:.1e}; from fp32: upstream {their_error:.1e}, ours {my_error:.1e}",
        f"ours from fp32 ≤ {BF16_MARGIN:g}x upstream's",
        my_error <= BF16_MARGIN * their_error,
    )


def dropout_noise(upstream: Contender, ours: Contender) -> dict:
    noise, steps = [], []
    for contender in (upstream, ours):
        still, _ = gradients(contender, "fp32", dora=False)
        dropped, step = gradients(contender, "fp32", dropout=0.05)
        noise.append(difference(contender, dropped, still)["overall"])
        steps.append(step)
    return row(
        "LoRA step fp32, dropout 0.05",
        *steps,
        f"gradients moved by dropout: upstream {noise[0]:.3f}, ours {noise[1]:.3f}",
        f"within {DROPOUT_MARGIN:.0%} of each other",
        abs(noise[1] / noise[0] - 1) <= DROPOUT_MARGIN,
    )


def mixed_batch(upstream: Contender, ours: Contender) -> dict:
    for contender in (upstream, ours):
        arguments = {"save_as": f"mixed-{contender.name}", "dtype": "fp32", "adapters": 8}
        contender.ask("compute", result="mixed_logits", arguments=arguments)
    apart = difference(upstream, f"mixed-{ours.name}", f"mixed-{upstream.name}")["overall"]
    return row(
        "logits of 8 adapters in a batch, fp32",
        {},
        {},
        f"logits {apart:.1e}",
        f"≤ {FP32_GRADIENT:g}",
        apart <= FP32_GRADIENT,
    )


def row(title: str, upstream: dict, ours: dict, found: str, tolerance: str, agrees: bool) -> dict:
    """Gradient norms are part of the row, so that agreement on gradients that are all zero would be seen."""
    norms = [step.get("gradient_norm") for step in (upstream, ours)]
    losses = [step.get("loss") for step in (upstream, ours)]
    nonzero = all(norm is None or norm > 0 for norm in norms)
    return {
        "title": title,
        "loss": losses,
        "gradient_norm": norms,
        "found": found,
        "tolerance": tolerance,
        "agrees": agrees and nonzero,
    }
