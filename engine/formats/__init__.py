"""Files of data as people publish them, down to raw rows: what stands in them, and where.

`sources.py` chooses the reader. `text_files.py` and `tables.py` read text, `arrow.py` Parquet, Arrow and folders that
`datasets` has saved, `hub.py` finds the files of a data set on the hub, `compression.py` unpacks.
"""
