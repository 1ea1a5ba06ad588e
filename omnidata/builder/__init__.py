"""Builder: corpora -> a complete dataset, resumable at every step.

settings, inputs    what was asked for, and that it exists
layout, plan        which record goes to which shard, decided first and kept in the output folder
worker, stages      one shard: records -> samples or rejects -> tar       (executors.py runs them)
dedup, finalize     what needs all shards; index, card, .nv-meta (interop.py), the manifest last
driver              knows all the stages; workspace.py guards the folder, progress.py and report.py tell
"""
