"""Inspect: see what a model would learn from, and foresee what training on it will take.

summary             totals and histograms, from the index      cost.py, forecast.py: FLOPs, hours, packs
samples             one sample as people can read it
terminal, html_report, notebook      three ways to show both   (report/ holds the page)
reports             what the commands print
"""
