"""Imported by fork servers: their workers make tables without pandas."""

from omnidata.start import keep_pandas_out

keep_pandas_out()
