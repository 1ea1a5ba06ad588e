"""Near: which pictures look alike and which texts say almost the same.

hashing   a picture -> 256 bits (perceptual hash); a text -> 64 numbers (MinHash) and what must be equal
pairs     those of many samples -> pairs that are near duplicates of each other
"""
