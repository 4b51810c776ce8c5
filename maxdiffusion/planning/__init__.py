"""Predicts a run's memory and time from its compiled programs; nothing is executed on a TPU."""
