"""Learning from rewards: `run.py` is PPO's loop, `round.py` one round of it, `advantages.py` its arithmetic.

`rollouts.py` lets the policy write, `actors.py` has it, its critic and the reference read that, `reward_model.py`
scores, `shared_base.py` has several models share one base, `config.py` holds what a user sets.
"""
