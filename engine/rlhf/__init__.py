"""Learning from rewards: `run.py` is PPO's loop, `round.py` one round of it, `advantages.py` its arithmetic.

`rollouts.py` lets the policy write, `reward_model.py` scores, `shared_base.py` has several models share one base;
`config.py` and `progress.py` hold what a user sets and gets.
"""
