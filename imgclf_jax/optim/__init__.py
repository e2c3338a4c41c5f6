"""Optimizers, schedules, rules by parameter, averages of weights."""
