"""Optimizers, schedules, per-parameter rules, sharding of the train state, and weight averages."""
