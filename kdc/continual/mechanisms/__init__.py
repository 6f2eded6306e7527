"""What a strategy adds to fine-tuning, one class in one file each; the base class says how.

A strategy (`kdc.continual.strategies`) is a row of settings that names one of these classes. The
learner knows only `Mechanism`.
"""
