"""Copier: samples of datasets that are there, copied into a new one. Nothing is tokenized or encoded again.

settings    what is copied from where, and into which shards
inputs      the datasets, opened; which of their rows are chosen; whether they fit together
layout      which samples go to which shard
worker      one shard: byte ranges in, checked and hashed, byte ranges out
finalize    tables, card, other readers' files; the manifest last
run         all of it, resumable as a build is
"""
