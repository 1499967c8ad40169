"""Muon, parameter groups and learning-rate schedules: plain functions, free of DeepSpeed and of ranks."""
