"""Builder: corpora -> a complete dataset, resumable at every step.

settings, inputs    what was asked for, and that it exists
layout, build_plan  which record goes to which shard, decided first and kept; identity.py: is it still ours?
worker, records     one shard: records -> samples or rejects -> tar       (executors.py runs them)
dedup, finalize     what needs all shards; index, card, .nv-meta (omnidata/interop.py), the manifest last
build               knows all the steps; workspace.py guards the folder, progress.py and report.py tell
"""
