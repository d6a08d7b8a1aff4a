"""Measures of answers, each one idea a file.

A sample adds a few numbers, and a measure is a function of their sums: so corpus measures such as BLEU, and intervals
over resampled samples, need nothing but the same sums again.
"""
