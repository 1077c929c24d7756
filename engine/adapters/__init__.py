"""Low-rank adapters: added (`lora.py`), switched and merged (`switch.py`), combined; on four-bit bases (`qlora.py`).

`config.py` says what an adapter looks like, `wrapping.py` makes foreign layers ready for one, `embedding.py` and
`token_rows.py` are about vocabularies, `belongings.py` about what trains beside the factors.
"""
