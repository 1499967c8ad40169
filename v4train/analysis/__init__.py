"""Formulas about a model, from its configuration alone."""
