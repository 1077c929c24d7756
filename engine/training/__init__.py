"""Training: `loop.py`, in steps of `optim.py`, evaluated by `evaluation.py`.

`freezing.py` says what trains, `run_folder.py` what a run writes, `state.py` and `checkpoint.py` what outlives a kill,
`guards.py` what a run is guarded against, `watching.py` who hears of it. Where only the head trains,
`cached_features.py` runs the rest once.
"""
