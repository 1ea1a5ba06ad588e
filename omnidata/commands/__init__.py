"""Commands: what each command of the CLI does once its options are parsed: a few calls, then text or JSON.

inspect, verify, plan   look at a dataset
dry_run                 ``build-shards --dry-run``
"""
