"""Low-rank adapters: added (`lora.py`), switched and merged (`switch.py`), combined; on four-bit bases (`qlora.py`).

`config.py` says what an adapter looks like, `targets.py` which modules it goes on, and `wrapping.py` what a layer that
carries one answers; it makes foreign layers ready for that. `embedding.py` and `token_rows.py` are about vocabularies,
`tied.py` about matrices in several modules, and `modules_to_save.py` about what else trains with an adapter.
"""
