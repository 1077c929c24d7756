"""Checkpoints in Hugging Face layout, read and written.

In the order of reading: `hub.py` finds the folder, `info.py` reads config.json, `loading.py` makes the model
(`tasks.py` says with which head, `pooling.py` how an embedding pools), and `weights.py` fills it from `shards.py` and
`safetensors_io.py`. `saving.py` is the way back.
"""
