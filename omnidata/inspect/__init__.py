"""Inspect: see what a model would learn from.

summary             totals and histograms, from the index
samples             one sample as people can read it
terminal, html_report, notebook      three ways to show both   (report/ holds the page)
"""
