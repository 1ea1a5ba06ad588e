"""Leaks: samples of a dataset that hold questions, answers or pictures of a benchmark.

ngrams      a text -> hashes of its runs of words
benchmark   a JSON or Parquet file, or another dataset -> entries with texts and picture hashes
search      every sample against all entries, in parallel
report      leaks.parquet, exclude.txt, and what to print
"""
